"""The clients' side of the federation: all that a client answers when the server asks, for one
client or for many.

The simulator holds every client in one `ClientSide`; a networked client holds itself alone in one
of its own. Whatever is not in an answer stays: pairs, features, prior logits, labels, optimiser
state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedvpa.federated.aggregators import bounded
from fedvpa.federated.batch import ClientStore, first_pairs, select
from fedvpa.federated.components import Moments, assignments, moments, summed_moments
from fedvpa.federated.draws import local_draws
from fedvpa.federated.local import LocalSettings, require_finite, stack, train_locally
from fedvpa.federated.objective import (
    PRIOR_LOGIT,
    PROTOTYPES,
    RoundContext,
    VariationalObjective,
    WithFixed,
)
from fedvpa.federated.population import Scores, summed_scores
from fedvpa.federated.privacy import Privacy
from fedvpa.federated.simulation import Simulation
from fedvpa.functional.preference import mean_choice_loss, predictive_margin
from fedvpa.selector.selector import Selector
from fedvpa.types import MixturePrior, PairBatch, Params, Population, Posterior

WITHHELD = 0.2
"""Share of a client's pairs by which the number of components is chosen."""
SMALLEST_DIVIDED = 4
"""Clients with fewer pairs withhold none."""


@dataclass(frozen=True)
class Schedule:
    """When the prior, the prototypes and the KL weight switch on (rounds), and how strongly."""

    kl_weight: float = 0.002
    kl_schedule: Literal["constant", "linear", "cyclical"] = "constant"
    kl_warmup_rounds: int = 10
    prior: Literal["gaussian", "peers", "components"] = "gaussian"
    prior_start: int = 0
    prior_members: Literal["known", "last-round"] = "known"
    prototypes: Literal["none", "learned", "fixed", "anchored"] = "none"
    prototypes_start: int = 0
    pull_weight: float = 1.0

    def beta(self, round_number: int) -> float:
        """KL weight of a round: constant, a linear warm-up, or one that starts anew every cycle
        (Fu et al., 2019)."""
        if self.kl_schedule == "constant":
            return self.kl_weight
        position = (
            round_number % self.kl_warmup_rounds if self.kl_schedule == "cyclical" else round_number
        )
        ramp = (
            self.kl_warmup_rounds / 2 if self.kl_schedule == "cyclical" else self.kl_warmup_rounds
        )
        return self.kl_weight * min(1.0, position / ramp)

    @property
    def anchored(self) -> bool:
        """Whether fitted components are frozen and act in training."""
        return self.prototypes == "anchored"

    @property
    def orthogonal(self) -> bool:
        """Whether there are orthogonal prototypes."""
        return self.prototypes in ("learned", "fixed")

    @property
    def sends_posterior(self) -> bool:
        """Whether the server needs every client's posterior each round: for the peers' prior, or to
        label clients itself."""
        return self.prior == "peers" or (self.orthogonal and self.prior != "components")


class Broadcast(NamedTuple):
    """What every client of a round is sent. `fixed` parameters are not trained; with `summed`,
    clients answer with moments of their latent under the prior's components."""

    round: int
    params: Params
    prior: MixturePrior | None = None
    anchors: Population | None = None
    price: Float[Tensor, "m"] | None = None
    fixed: tuple[str, ...] = ()
    summed: bool = False

    @property
    def trainable(self) -> Params:
        """Parameters that clients change."""
        return {name: value for name, value in self.params.items() if name not in self.fixed}


class Update(NamedTuple):
    """What a chunk of clients answers to a broadcast, and what it keeps (`private`: rows of its
    tables).

    `moments` are each client's own, under the components that were broadcast; `labelled` its choice
    among them. With `together`, this is one row for that many clients: means of parameters and
    losses, sums of the rest (a secure sum).
    """

    params: Params
    posterior: Posterior | None
    losses: dict[str, Float[Tensor, "c"]]
    private: Params
    size: Float[Tensor, "c"] | None = None
    moments: Moments | None = None
    labelled: Float[Tensor, "c m"] | None = None
    together: int = 0


@runtime_checkable
class Participants(Protocol):
    """The clients, wherever they are. `tables` holds one row a client of what is private to it,
    where it is kept here."""

    def __len__(self) -> int: ...

    def train(
        self, broadcast: Broadcast, cohort: Sequence[int], tables: Params
    ) -> Iterator[tuple[Int[Tensor, "c"], Update]]:
        """Local rounds of the cohort, in chunks; those who did not answer are missing."""
        ...

    def posteriors(
        self, params: Params, *, withhold: bool = False
    ) -> tuple[Int[Tensor, "c"], Posterior]:
        """Who answered, and their posteriors under a model (`withhold`: without the choices kept
        out of training)."""
        ...

    def moments(
        self, params: Params, centre: Float[Tensor, "t m d"], *, withhold: bool = False
    ) -> Moments:
        """Sum over clients of their moments under given centres."""
        ...

    def scores(self, params: Params, populations: Sequence[Population]) -> Scores:
        """Sum over clients of the log-probabilities of their withheld choices."""
        ...

    def settle(self, params: Params, population: Population) -> Params:
        """Let every client note which component it belongs to; its row of the tables, where
        these are kept here."""
        ...


@dataclass(frozen=True)
class ClientSide:
    """The clients of `store`. `centralised` pools them: one model takes every step on all of
    them at once."""

    store: ClientStore
    selector: Selector
    objective: VariationalObjective
    local: LocalSettings
    simulation: Simulation
    schedule: Schedule
    posterior_from: Literal["broadcast", "local"] = "broadcast"
    withholds: bool = False
    identity: Int[Tensor, "c"] | None = None
    privacy: Privacy | None = None
    centralised: bool = False

    def __len__(self) -> int:
        return len(self.store)

    def train(
        self, broadcast: Broadcast, cohort: Sequence[int], tables: Params
    ) -> Iterator[tuple[Int[Tensor, "c"], Update]]:
        """Chunks of the cohort, a chunk to a thread.

        Raises:
            NonFiniteUpdateError: a client's update holds NaN or Inf.
        """
        per_client = sum(value.numel() for value in broadcast.params.values())
        chunks = [list(cohort)] if self.centralised else self.simulation.chunks(cohort, per_client)
        for chunk, update in zip(
            chunks, self.simulation.map(lambda c: self._round(broadcast, c, tables), chunks)
        ):
            yield torch.tensor(chunk), update

    def _round(self, broadcast: Broadcast, chunk: Sequence[int], tables: Params) -> Update:
        """Train these clients side by side from the broadcast parameters."""
        clients = torch.tensor(chunk)
        names = [self.store.names[c] for c in chunk]
        pairs, held = self.divided(clients, broadcast.round + 1)
        if held.any():
            kept = pairs.mask & ~held
            pairs = first_pairs(pairs._replace(mask=kept), int(kept.sum(-1).max()))
        with torch.no_grad():
            before = self.selector.posterior(broadcast.params, pairs, pairs.mask)
        private, labelled = self._labels(broadcast, before, tables["label"][clients])
        context = self._context(broadcast, clients, pairs, private["label"])
        fixed = {PROTOTYPES} if self.schedule.prototypes == "fixed" else set()
        params = stack(broadcast.params, 1 if self.centralised else len(chunk))
        trainable = {name: value for name, value in params.items() if name not in fixed}
        if "prior_logit" in tables and context.prior is not None:
            trainable[PRIOR_LOGIT] = tables["prior_logit"][clients]
        objective = WithFixed(
            self.objective, {name: params[name] for name in fixed if name in params}
        )
        result = train_locally(
            objective,
            trainable,
            pairs,
            names,
            broadcast.round,
            self.local,
            context,
            check_each_step=self.simulation.debug,
        )
        trained = dict(result.params)
        logit = trained.pop(PRIOR_LOGIT, None)
        if self.privacy is not None:
            trained = bounded(broadcast.trainable, trained, self.privacy.clip)
        if logit is not None:
            private["prior_logit"] = logit
        posterior = before
        if self.posterior_from == "local":
            with torch.no_grad():
                posterior = self.selector.posterior(trained, pairs, pairs.mask)
        checked = dict(posterior._asdict()) | (trained if not self.centralised else {})
        require_finite(checked, names, broadcast.round)
        return Update(
            trained,
            posterior if self.schedule.sends_posterior else None,
            result.losses,
            private,
            self.store.sizes[clients].float(),
            self._own_moments(broadcast, posterior),
            labelled,
        )

    def _labels(
        self, broadcast: Broadcast, posterior: Posterior, label: Tensor
    ) -> tuple[Params, Tensor | None]:
        """The prototype that pulls each client (M6): the server's choice, or by prices its own
        among the components."""
        if broadcast.price is None or broadcast.prior is None:
            return {"label": label}, None
        chosen = assignments(posterior.mean, broadcast.prior.mean, broadcast.price)
        return {"label": chosen.argmax(-1)}, chosen

    def _own_moments(self, broadcast: Broadcast, posterior: Posterior) -> Moments | None:
        if self.schedule.prior != "components" or broadcast.prior is None:
            return None
        mean, variance = self._bounded(posterior)
        return moments(assignments(mean, broadcast.prior.mean), mean, variance)

    def _bounded(self, posterior: Posterior) -> tuple[Float[Tensor, "c d"], Float[Tensor, "c d"]]:
        """Means and variances as they enter moments: within the bounds of differential privacy,
        where it is asked for."""
        mean, variance = posterior.mean, posterior.log_var.exp()
        return (
            (mean, variance)
            if self.privacy is None
            else self.privacy.clipped_latent(mean, variance)
        )

    def _context(
        self, broadcast: Broadcast, clients: Tensor, pairs: PairBatch, label: Tensor
    ) -> RoundContext:
        """What the clients make of what they were sent besides the parameters."""
        started = broadcast.round >= self.schedule.prototypes_start
        with torch.no_grad():
            anchors = broadcast.anchors
            evidence = (
                None
                if anchors is None
                else self.selector.evidence(broadcast.params, anchors, pairs)
            )
        return RoundContext(
            prior=broadcast.prior,
            anchors=anchors,
            evidence=evidence,
            label=label if started else torch.full_like(label, -1),
            client=self._identity(clients),
            kl_weight=self.schedule.beta(broadcast.round),
            pull_weight=self.schedule.pull_weight if started else 0.0,
        )

    def _identity(self, clients: Int[Tensor, "c"]) -> Int[Tensor, "c"]:
        """By what number the server knows these clients."""
        return clients if self.identity is None else self.identity[clients]

    def divided(
        self, clients: Int[Tensor, "c"], round_number: int
    ) -> tuple[PairBatch, Bool[Tensor, "c n"]]:
        """The clients' pairs, and which of them are kept out of training until the anchors are
        fitted: a fifth, drawn once, where the number of anchors has yet to be found. Withheld
        pairs come last."""
        pairs = self.store.batch(clients)
        none = torch.zeros_like(pairs.mask)
        if not self.withholds or round_number > self.schedule.prototypes_start or self.centralised:
            return pairs, none
        sizes = pairs.mask.sum(-1)
        names = [self.store.names[c] for c in clients.tolist()]
        order = local_draws(self.local.seed, -1, names, sizes, 1, 0, 0, 0).order[:, 0]
        kept = sizes - torch.where(
            sizes < SMALLEST_DIVIDED, 0, (WITHHELD * sizes).round().long().clamp_min(1)
        )
        column = torch.arange(order.shape[-1])
        held = (column >= kept.unsqueeze(-1)) & (column < sizes.unsqueeze(-1))
        return select(pairs, order, column < sizes.unsqueeze(-1)), held

    def _blocks(self, withhold: bool) -> Iterator[tuple[PairBatch, Bool[Tensor, "c n"]]]:
        """All clients in blocks: their pairs, and which of them are withheld (none unless
        asked)."""
        for at in range(0, len(self.store), 1000):
            clients = torch.arange(at, min(at + 1000, len(self.store)))
            yield self.divided(
                clients,
                self.schedule.prototypes_start if withhold else self.schedule.prototypes_start + 1,
            )

    @torch.no_grad()
    def posteriors(
        self, params: Params, *, withhold: bool = False
    ) -> tuple[Int[Tensor, "c"], Posterior]:
        """Every client's posterior from all of its pairs, or without the withheld ones."""
        parts = [
            self.selector.posterior(params, pairs, pairs.mask & ~held)
            for pairs, held in self._blocks(withhold)
        ]
        found = Posterior(torch.cat([p.mean for p in parts]), torch.cat([p.log_var for p in parts]))
        return torch.arange(len(self.store)), found

    @torch.no_grad()
    def moments(
        self, params: Params, centre: Float[Tensor, "t m d"], *, withhold: bool = False
    ) -> Moments:
        """Each client's moments under given centres, added up."""
        _, posterior = self.posteriors(params, withhold=withhold)
        return summed_moments(*self._bounded(posterior), centre)

    @torch.no_grad()
    def choice_scores(
        self, params: Params, populations: Sequence[Population]
    ) -> tuple[Tensor, Tensor]:
        """Mean log-probability [k, t] of every client's withheld choices under each population, and
        who withheld any."""
        parts, counted = [], []
        for pairs, held in self._blocks(withhold=True):
            mean = self.selector.posterior(params, pairs, pairs.mask & ~held).mean
            columns = []
            for population in populations:
                margin = self.selector.component_margins(params, population, pairs)
                share = self.selector.combine(
                    population, logsigmoid(margin), mean, pairs.mask & ~held
                )
                columns.append(-mean_choice_loss(predictive_margin(share, margin), held.float()))
            parts.append(torch.stack(columns, -1))
            counted.append(held.any(-1))
        return torch.cat(parts), torch.cat(counted)

    def scores(self, params: Params, populations: Sequence[Population]) -> Scores:
        """Those of all clients, added up."""
        each, counted = self.choice_scores(params, populations)
        return summed_scores(each[counted])

    @torch.no_grad()
    def settle(self, params: Params, population: Population) -> Params:
        """The component of the greatest responsibility given all of a client's pairs."""
        labels = [
            self.selector.responsibilities(params, population, pairs, pairs.mask).argmax(-1)
            for pairs, _ in self._blocks(withhold=False)
        ]
        return {"label": torch.cat(labels)}
