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
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedvpa.data.content import Policy, seen_before
from fedvpa.evaluation.statistics import share
from fedvpa.federated.algorithm import Predictor, SharedBeside
from fedvpa.federated.batch import ClientStore, first_pairs, like_sized, select, trimmed, widths
from fedvpa.federated.content import Divider
from fedvpa.federated.random import stream
from fedvpa.functional.preference import expected_calibration_error
from fedvpa.telling import tell
from fedvpa.types import PairBatch, Posterior

CONTROLS = ("own", "other_group", "shuffled", "prior_mean", "shared", "flipped")
"""The client's own state; states of clients of the other groups; of a random other client; the
prior mean; a shared reward that was trained beside, where there is one; and the state inferred from
the client's context with all labels reversed."""
NUMBERS = 1 << 22
"""Numbers of the padded pairs that are predicted side by side."""


@dataclass(frozen=True)
class Trial:
    """One division of every user's pairs: contexts [u, n] and targets [u, m], padded.

    `overlap` says how many of a target's two responses the user has judged in the context (None:
    unknown); `scored` marks the targets that count.
    """

    context: PairBatch
    target: PairBatch
    overlap: Int[Tensor, "u m"] | None = None
    scored: Bool[Tensor, "u m"] | None = None

    @property
    def mask(self) -> Bool[Tensor, "u m"]:
        """Targets that count."""
        return self.target.mask if self.scored is None else self.target.mask & self.scored


@dataclass
class Scores:
    """Per-client scores of one condition, summed over trials, and all probabilities given to the
    choices made."""

    correct: Float[Tensor, "u"]
    nll: Float[Tensor, "u"]
    count: Float[Tensor, "u"]
    probability: list[Float[Tensor, "n"]] = field(default_factory=list)
    overlap: Float[Tensor, "three three"] = field(default_factory=lambda: torch.zeros(3, 3))
    """By the responses judged before (0, 1, 2): targets, right ones, and nats, of all targets."""

    @staticmethod
    def empty(users: int) -> Scores:
        """Scores of so many users, before the first trial."""
        return Scores(torch.zeros(users), torch.zeros(users), torch.zeros(users))

    def add(self, margin: Float[Tensor, "u m"], mask: Tensor, trial: Trial | None = None) -> None:
        """Count a tie as half right; of a `trial` with overlaps also by these."""
        weight = mask.to(margin.dtype)
        right = (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)
        if trial is not None and trial.overlap is not None:
            for k in range(3):
                own = (trial.target.mask & (trial.overlap == k)).to(margin.dtype)
                sums = (own.sum(), (right * own).sum(), (-logsigmoid(margin) * own).sum())
                self.overlap[k] += torch.stack(sums)
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

    def pooled_accuracy(self) -> float:
        """Accuracy over all targets; NaN without any."""
        return float(self.correct.sum() / self.count.sum())

    def pooled_nll(self) -> float:
        """Negative log-likelihood over all targets, in nats per pair."""
        return float(self.nll.sum() / self.count.sum())

    def ece(self) -> float:
        """Expected calibration error over all targets."""
        return expected_calibration_error(torch.cat(self.probability))


def split_trials(
    store: ClientStore, context: int, repeats: int, seed: int, content: Policy = "repeated"
) -> list[Trial]:
    """Random divisions of every client's pairs: at most `context`, and at most half of them, as
    context; targets are the rest, without those that share a response (or, where it can be helped,
    a prompt) with the context, if ``content`` is ``new``."""
    everyone = torch.arange(len(store))
    pairs, sizes = store.batch(everyone), store.sizes
    row, _ = store.rows(everyone)
    sides = Divider.of(store, content).sides(store, everyone)
    # whole groups of pairs fill up to half of them; responses are dealt evenly
    grouped = (sides.pairs.sum(-1) == sizes) & (sides.left == sides.right).all(-1)
    held = torch.minimum(sizes // 2, torch.tensor(context))
    share = torch.where(grouped, held / sizes.clamp_min(1), 0.5)
    trials = []
    for repeat in range(repeats):
        keys, order = torch.zeros(sides.exists.shape), torch.full(pairs.mask.shape, 2.0)
        for c, name in enumerate(store.names):
            generator = stream(seed, "split", repeat, name)
            units, n = int(sides.exists[c].sum()), int(sizes[c])
            keys[c, :units] = torch.rand(units, generator=generator)
            order[c, :n] = torch.rand(n, generator=generator)
        known, target = sides.dealt(keys, share)
        # the context's pairs first, in random order, no more than asked for
        first = torch.where(known, order, 2.0).argsort(-1)
        position = torch.arange(order.shape[-1])
        count = torch.minimum(known.sum(-1), torch.tensor(context))
        is_context = position < count.unsqueeze(-1)
        width = int(count.max())
        chosen = first[:, :width]
        marked = torch.zeros_like(target).scatter(-1, first, is_context)
        overlap = _overlap(store.content, row, marked, row, target)
        last = target.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        last = last[:, : max(1, int(target.sum(-1).max()))]
        trials.append(
            Trial(
                select(pairs, chosen, is_context[:, :width]),
                select(pairs, last, target.gather(-1, last)),
                None if overlap is None else overlap.gather(-1, last),
            )
        )
    return trials


def given_trial(context: ClientStore, target: ClientStore, content: Policy = "repeated") -> Trial:
    """Contexts and targets from two stores of the same clients (seen clients: their training pairs,
    held-out pairs); with ``content: new`` only targets count of which the client has judged no
    response in the context."""
    everyone = torch.arange(len(context))
    known, asked = context.rows(everyone), target.rows(everyone)
    overlap = None
    if context.content is not None and target.content is not None:
        overlap = _overlap(context.content, *known, *asked, target.content)
    scored = overlap == 0 if content == "new" and overlap is not None else None
    return Trial(context.batch(everyone), target.batch(everyone), overlap, scored)


def _overlap(
    content: Int[Tensor, "rows 3"] | None, row: Tensor, known: Tensor, other_row: Tensor,
    asked: Tensor, other: Tensor | None = None,
) -> Int[Tensor, "u m"] | None:  # fmt: skip
    """How many responses of each target its user has judged in the context."""
    if content is None:
        return None
    other = content if other is None else other
    out = torch.zeros(asked.shape, dtype=torch.long)
    for u in range(len(row)):
        has = asked[u]
        found = seen_before(other[other_row[u][has]].numpy(), content[row[u][known[u]]].numpy())
        out[u, has] = torch.from_numpy(found)
    return out


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
    state = adapted(predictor, trial.context, group)
    scores.add(margins(predictor, state, trial.target), trial.target.mask)
    own = target.sizes > 0
    return (scores.correct / scores.count)[own], (scores.nll / scores.count)[own]


def adapted(
    predictor: Predictor, context: PairBatch, group: Int[Tensor, "u"]
) -> Float[Tensor, "u s"]:
    """State of every user given its context, users of like size side by side."""
    blocks = _blocks(context)
    parts = [predictor.adapt(trimmed(context, index), group[index]) for index in blocks]
    return torch.cat(parts)[torch.cat(blocks).argsort()]


def margins(
    predictor: Predictor, state: Float[Tensor, "u s"], target: PairBatch
) -> Float[Tensor, "u m"]:
    """Margins of every user's targets under its state, users of like size side by side."""
    out = torch.zeros(target.mask.shape)
    for index in _blocks(target):
        found = predictor.margin(state[index], trimmed(target, index))
        out[index, : found.shape[-1]] = found
    return out


def posteriors(infer: Callable[[PairBatch], Posterior], context: PairBatch) -> Posterior:
    """Posteriors of all users, users of like size side by side."""
    blocks = _blocks(context)
    parts, order = [infer(trimmed(context, index)) for index in blocks], torch.cat(blocks).argsort()
    return Posterior(*(torch.cat(list(values))[order] for values in zip(*parts)))


def shares(infer: Callable[[PairBatch], Tensor], context: PairBatch) -> Float[Tensor, "u m"]:
    """Responsibilities of all users, users of like size side by side."""
    blocks = _blocks(context)
    found = torch.cat([infer(trimmed(context, index)) for index in blocks])
    return found[torch.cat(blocks).argsort()]


def _blocks(batch: PairBatch) -> list[Int[Tensor, "b"]]:
    """Users by the number of their pairs, as many side by side as `NUMBERS` allow, the largest of
    them with at most twice the pairs of the smallest."""
    inputs = batch.difference.shape[-1]
    return like_sized(widths(batch), 2.0, lambda size: NUMBERS // max(1, size * inputs))


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
        own = adapted(predictor, trial.context, group)
        mask = trial.mask
        out["own"].add(margins(predictor, own, trial.target), mask, trial)
        nobody = margins(predictor, predictor.neutral(users), trial.target)
        out["prior_mean"].add(nobody, mask, trial)
        if isinstance(predictor, SharedBeside):
            out["shared"].add(predictor.shared_margin(trial.target), mask, trial)
        turned = adapted(predictor, reversed_labels(trial.context), group)
        out["flipped"].add(margins(predictor, turned, trial.target), mask)
        if users > 1:
            other = derangement(users, stream(seed, "shuffle", repeat))
            out["shuffled"].add(margins(predictor, own[other], trial.target), mask)
        for other in _clients_of_other_groups(group, stream(seed, "other", repeat)):
            has = other >= 0
            out["other_group"].add(
                margins(predictor, own[other.clamp_min(0)], trial.target), mask & has.unsqueeze(-1)
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
            state = adapted(predictor, first_pairs(trial.context, size), group)
            scores.add(margins(predictor, state, trial.target), trial.mask)
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
