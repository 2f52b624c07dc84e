"""The honest protocol: z is inferred from context pairs and scored on disjoint target pairs.

Every user's pairs are divided into a context and targets, in several random ways; a method adapts
to the context and predicts the targets. Whether the adapted state is used at all is asked by
scoring the same targets with other states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedvpa.evaluation.statistics import share
from fedvpa.federated.algorithm import Predictor
from fedvpa.federated.batch import ClientStore, first_pairs, select
from fedvpa.federated.random import stream
from fedvpa.functional.preference import expected_calibration_error
from fedvpa.telling import tell
from fedvpa.types import PairBatch

CONTROLS = ("own", "other_group", "shuffled", "prior_mean", "flipped")
"""The client's own state; states of clients of the other groups; of a random other client; the
prior mean; and the state inferred from the client's context with all labels reversed."""


@dataclass(frozen=True)
class Trial:
    """One division of every user's pairs: contexts [u, n] and targets [u, m], padded."""

    context: PairBatch
    target: PairBatch


@dataclass
class Scores:
    """Per-client scores of one condition, summed over trials, and all probabilities given to the
    choices made."""

    correct: Float[Tensor, "u"]
    nll: Float[Tensor, "u"]
    count: Float[Tensor, "u"]
    probability: list[Float[Tensor, "n"]] = field(default_factory=list)

    @staticmethod
    def empty(users: int) -> Scores:
        """Scores of so many users, before the first trial."""
        return Scores(torch.zeros(users), torch.zeros(users), torch.zeros(users))

    def add(self, margin: Float[Tensor, "u m"], mask: Tensor) -> None:
        """Count a tie as half right."""
        weight = mask.to(margin.dtype)
        right = (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)
        self.correct += (right * weight).sum(-1)
        self.nll += (-logsigmoid(margin) * weight).sum(-1)
        self.count += weight.sum(-1)
        self.probability.append(torch.sigmoid(margin)[mask])

    def accuracy(self) -> list[float]:
        """Accuracy per client; NaN for a client without targets."""
        return (self.correct / self.count).tolist()

    def mean_nll(self) -> list[float]:
        """Negative log-likelihood per client, in nats per pair."""
        return (self.nll / self.count).tolist()

    def ece(self) -> float:
        """Expected calibration error over all targets."""
        return expected_calibration_error(torch.cat(self.probability))


def split_trials(store: ClientStore, context: int, repeats: int, seed: int) -> list[Trial]:
    """Random divisions of every client's pairs: at most `context`, and at most half of them, as
    context; targets the rest."""
    everyone = torch.arange(len(store))
    pairs = store.batch(everyone)
    sizes = store.sizes
    trials = []
    for repeat in range(repeats):
        keys = torch.full(pairs.mask.shape, 2.0)
        for c, name in enumerate(store.names):
            keys[c, : int(sizes[c])] = torch.rand(
                int(sizes[c]), generator=stream(seed, "split", repeat, name)
            )
        order = keys.argsort(-1)
        held = torch.minimum(sizes // 2, torch.tensor(context))
        position = torch.arange(pairs.mask.shape[-1])
        width = int(held.max())
        is_context = position < held.unsqueeze(-1)
        is_target = (position >= held.unsqueeze(-1)) & (position < sizes.unsqueeze(-1))
        trials.append(
            Trial(
                select(pairs, order[:, :width], is_context[:, :width]),
                _left_aligned(select(pairs, order, is_target)),
            )
        )
    return trials


def given_trial(context: ClientStore, target: ClientStore) -> Trial:
    """Contexts and targets from two stores of the same clients (seen clients: their training pairs,
    held-out pairs)."""
    everyone = torch.arange(len(context))
    return Trial(context.batch(everyone), target.batch(everyone))


class Validation(NamedTuple):
    """Sums over clients that hold any pairs out: how many, accuracy, NLL (nats per pair)."""

    clients: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
    nll: Float[Tensor, ""]

    def row(self) -> dict[str, float]:
        """Means over these clients; empty without any."""
        count = float(self.clients)
        if not count:
            return {}
        return {
            "validation_accuracy": float(self.accuracy) / count,
            "validation_nll": float(self.nll) / count,
            "validation_clients": count,
        }


def validation(
    predictor: Predictor, context: ClientStore, target: ClientStore, group: Int[Tensor, "k"]
) -> Validation:
    """A predictor on the clients' held-out pairs, each preference inferred from the training pairs;
    float64, so that secure sums carry it."""
    return _summed(*_validated(predictor, context, target, group))


def validation_row(
    predictor: Predictor, context: ClientStore, target: ClientStore, group: Int[Tensor, "k"]
) -> dict[str, float]:
    """The same with a 95 % interval over the clients, where these are in one place."""
    accuracy, nll = _validated(predictor, context, target, group)
    row = _summed(accuracy, nll).row()
    spread = share(accuracy.tolist())
    if row and not math.isnan(spread["low"]):
        row |= {"validation_low": spread["low"], "validation_high": spread["high"]}
    return row


def _summed(accuracy: Float[Tensor, "c"], nll: Float[Tensor, "c"]) -> Validation:
    count = torch.tensor(float(len(accuracy)), dtype=torch.float64)
    return Validation(count, accuracy.double().sum(), nll.double().sum())


def _validated(
    predictor: Predictor, context: ClientStore, target: ClientStore, group: Int[Tensor, "k"]
) -> tuple[Float[Tensor, "c"], Float[Tensor, "c"]]:
    """Accuracy and NLL of every client that holds any pairs out."""
    if int(target.sizes.sum()) == 0:
        return torch.zeros(0), torch.zeros(0)
    trial = given_trial(context, target)
    scores = Scores.empty(len(context))
    scores.add(
        predictor.margin(predictor.adapt(trial.context, group), trial.target), trial.target.mask
    )
    own = target.sizes > 0
    return (scores.correct / scores.count)[own], (scores.nll / scores.count)[own]


def reversed_labels(context: PairBatch) -> PairBatch:
    """The same comparisons with every answer reversed."""
    return context._replace(difference=-context.difference, order=-context.order)


def evaluate_controls(
    predictor: Predictor, trials: Sequence[Trial], group: Int[Tensor, "u"], seed: int
) -> dict[str, Scores]:
    """Scores under each of `CONTROLS`; `other_group` is left out where there is one group only."""
    users = group.numel()
    out = {name: Scores.empty(users) for name in CONTROLS}
    for repeat, trial in enumerate(trials):
        tell("scoring under the controls", repeat, len(trials))
        own = predictor.adapt(trial.context, group)
        mask = trial.target.mask
        out["own"].add(predictor.margin(own, trial.target), mask)
        out["prior_mean"].add(predictor.margin(predictor.neutral(users), trial.target), mask)
        out["flipped"].add(
            predictor.margin(predictor.adapt(reversed_labels(trial.context), group), trial.target),
            mask,
        )
        if users > 1:
            other = derangement(users, stream(seed, "shuffle", repeat))
            out["shuffled"].add(predictor.margin(own[other], trial.target), mask)
        for other in _clients_of_other_groups(group, stream(seed, "other", repeat)):
            has = other >= 0
            out["other_group"].add(
                predictor.margin(own[other.clamp_min(0)], trial.target), mask & has.unsqueeze(-1)
            )
    tell("scoring under the controls", len(trials), len(trials))
    return {name: scores for name, scores in out.items() if scores.probability}


def evaluate_few_shot(
    predictor: Predictor, trials: Sequence[Trial], group: Int[Tensor, "u"], sizes: Sequence[int]
) -> dict[int, Scores]:
    """Scores by number of context pairs; the targets are the same for every size."""
    out = {size: Scores.empty(group.numel()) for size in sizes}
    for done, trial in enumerate(trials):
        tell("scoring by number of context pairs", done, len(trials))
        for size, scores in out.items():
            state = predictor.adapt(first_pairs(trial.context, size), group)
            scores.add(predictor.margin(state, trial.target), trial.target.mask)
    tell("scoring by number of context pairs", len(trials), len(trials))
    return out


def leaking_accuracy(predictor: Predictor, trials: Sequence[Trial]) -> float:
    """Accuracy of the published protocol, which LEAKS: every target's state is inferred from
    that very target, label and all. Reported to show what it hides; no other number of this
    package is made this way."""
    right = total = 0.0
    for trial in trials:
        pairs = trial.target
        chosen = pairs.mask.nonzero(as_tuple=True)
        alone = PairBatch(*(None if v is None else v[chosen].unsqueeze(1) for v in pairs))  # type: ignore[arg-type]
        margin = predictor.margin(
            predictor.adapt(alone, torch.full((alone.mask.shape[0],), -1)), alone
        )
        right += float((margin > 0).sum() + 0.5 * (margin == 0).sum())
        total += margin.numel()
    return right / max(1.0, total)


def by_group(
    values: Sequence[float],
    group: Int[Tensor, "u"],
    names: Sequence[str],
    summarise: Callable[[list[float]], object],
) -> dict[str, object]:
    """Summary of the clients of each group."""
    return {
        name: summarise([v for v, g in zip(values, group.tolist()) if g == i])
        for i, name in enumerate(names)
    }


def derangement(count: int, generator: torch.Generator) -> Int[Tensor, "u"]:
    """A random permutation that leaves nobody in place (a random cycle)."""
    order = torch.randperm(count, generator=generator)
    out = torch.empty(count, dtype=torch.long)
    out[order] = order.roll(1)
    return out


def _clients_of_other_groups(
    group: Int[Tensor, "u"], generator: torch.Generator
) -> list[Int[Tensor, "u"]]:
    """For every other group one random client of it, for each user (-1: none); a list of [u]."""
    present = sorted(set(group.tolist()) - {-1})
    if len(present) < 2:
        return []
    members = {g: (group == g).nonzero().squeeze(-1) for g in present}
    out = []
    for shift in range(1, len(present)):
        chosen = torch.full_like(group, -1)
        for i, g in enumerate(present):
            other = members[present[(i + shift) % len(present)]]
            pick = torch.randint(other.numel(), (members[g].numel(),), generator=generator)
            chosen[members[g]] = other[pick]
        out.append(chosen)
    return out


def _left_aligned(batch: PairBatch) -> PairBatch:
    """Move the unmasked pairs to the front and cut the padding."""
    order = batch.mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return select(batch, order[:, : int(batch.mask.sum(-1).max())], torch.tensor(True))
