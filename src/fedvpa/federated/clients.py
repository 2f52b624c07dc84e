"""The clients' side of the federation: all that clients answer when the server asks, for one client
or for many.

The simulator holds every client in one `SimulatedClients`; a networked client holds itself alone in
one of its own. Whatever is not in an answer stays: pairs, features, prior logits, labels, optimiser
state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedvpa.config import Config, settings_read
from fedvpa.errors import BadInputError
from fedvpa.federated.accounting import Privacy, privacy_of
from fedvpa.federated.aggregators import RobustMean, bounded, robust_of
from fedvpa.federated.batch import ClientStore, Roster
from fedvpa.federated.components import Moments, assignments, moments, summed_moments
from fedvpa.federated.local import (
    LocalSettings,
    build_local,
    require_finite,
    silenced,
    stack,
    train_locally,
)
from fedvpa.federated.messages import PRIOR_LOGIT, Broadcast, Contract, Scores, Update
from fedvpa.federated.objective import RoundContext, VariationalObjective
from fedvpa.federated.population import modes_of, summed_scores
from fedvpa.federated.priors import build_prior
from fedvpa.federated.release import clipped_latent
from fedvpa.federated.robust import robust_moments
from fedvpa.federated.simulation import Chunk, Simulation, best_width, build_simulation
from fedvpa.federated.variational import contract_of
from fedvpa.federated.withheld import Withheld
from fedvpa.functional.preference import mean_choice_loss
from fedvpa.selector.heads import DirectionalHead
from fedvpa.selector.predictor import VariationalPredictor
from fedvpa.selector.selector import Selector, build_selector
from fedvpa.types import PairBatch, Params, Population, Posterior


@dataclass(frozen=True)
class Schedule:
    """Weights of the KL and of the pull by round."""

    kl_weight: float = 0.002
    kl_schedule: Literal["constant", "linear", "cyclical"] = "constant"
    kl_warmup_rounds: int = 10
    pull_start: int = 0
    pull_weight: float = 1.0

    def beta(self, round_number: int) -> float:
        """KL weight of a round: constant, a linear warm-up, or one that starts anew every cycle
        (Fu et al., 2019)."""
        warmup = self.kl_warmup_rounds
        if self.kl_schedule == "constant":
            return self.kl_weight
        if self.kl_schedule == "linear":
            return self.kl_weight * min(1.0, round_number / warmup)
        return self.kl_weight * min(1.0, (round_number % warmup) / (warmup / 2))


@dataclass(frozen=True)
class SimulatedClients:
    """The clients of `store`, in this process.

    Args:
        store: their pairs.
        selector: encoder and reward head.
        objective: what they minimise.
        local: how they train.
        simulation: how many of them side by side.
        schedule: weights by round.
        contract: what they send.
        posterior_from: a posterior is that under the `broadcast` model, or after `local` steps.
        withhold_until: the last round in which a fifth of the pairs are kept from training, by
            which the number of anchors is found (None: no pairs are).
        identity: by what number the server knows them (None: their place in the store).
        privacy: bounds of their contributions.
        robust: how their latents are averaged, if attackers are to be withstood.
    """

    store: ClientStore
    selector: Selector
    objective: VariationalObjective
    local: LocalSettings
    simulation: Simulation
    schedule: Schedule
    contract: Contract
    posterior_from: Literal["broadcast", "local"] = "broadcast"
    withhold_until: int | None = None
    identity: Int[Tensor, "c"] | None = None
    privacy: Privacy | None = None
    robust: RobustMean | None = None

    def __len__(self) -> int:
        return len(self.store)

    @property
    def roster(self) -> Roster:
        """Names and groups of the clients."""
        return self.store.roster

    def train(
        self, broadcast: Broadcast, cohort: Sequence[int], tables: Params
    ) -> Iterator[tuple[Int[Tensor, "c"], Update]]:
        """Chunks of the cohort, one chunk per thread.

        Raises:
            NonFiniteUpdateError: a client's update holds NaN or Inf.
        """
        per_client = sum(value.numel() for value in broadcast.params.values())
        store = self.withheld.trained_on(broadcast.round + 1)
        chunks = self._chunks(cohort, store.sizes[torch.tensor(cohort)].tolist(), per_client)
        answers = self.simulation.map(lambda c: self._round(broadcast, store, c, tables), chunks)
        for chunk, update in zip(chunks, answers):
            yield torch.tensor(chunk.clients), update

    def _chunks(self, cohort: Sequence[int], sizes: list[int], per_client: int) -> list[Chunk]:
        found = self.simulation.chunks(cohort, sizes, per_client)
        # a context of one pair has no need of blocks
        return [c._replace(width=0) for c in found] if self.objective.single_pair else found

    def _round(
        self, broadcast: Broadcast, store: ClientStore, chunk: Chunk, tables: Params
    ) -> Update:
        """Train these clients side by side from the broadcast parameters, on the pairs of
        `store`."""
        # 1. The clients' own pairs; those that are withheld do not take part at all.
        clients = torch.tensor(chunk.clients)
        names, count = [store.names[c] for c in chunk.clients], len(chunk.clients)
        pairs = store.batch(clients, chunk.width)
        # 2. Where each client stands under the model that was sent.
        with torch.no_grad():
            before = self.selector.posterior(broadcast.params, pairs, pairs.mask)
        private, labelled = self._labels(broadcast, before, tables["label"][clients])
        loss = self.objective.given(self._context(broadcast, clients, pairs, private["label"]))
        # 3. The local steps; the logits of the mixture's weights are trained, and stay.
        start = self._stacked(broadcast.trainable, count)
        if "prior_logit" in tables and broadcast.prior is not None:
            start[PRIOR_LOGIT] = tables["prior_logit"][clients]
        fixed = {n: v for n, v in broadcast.params.items() if n in broadcast.fixed}
        result = train_locally(
            loss, start, pairs, names, broadcast.round, self.local,
            fixed=self._stacked(fixed, count), check_each_step=self.simulation.debug,
        )  # fmt: skip
        trained = dict(result.params)
        logit = trained.pop(PRIOR_LOGIT, None)
        if logit is not None:
            kept = tables["prior_logit"][clients]
            finite = logit.isfinite() if self.privacy is not None else torch.ones_like(logit).bool()
            private["prior_logit"] = torch.where(finite, logit, kept)
        if self.privacy is not None:
            trained = bounded(broadcast.trainable, trained, self.privacy.clip)
        # 4. What is answered; NaN is refused here, where the client is known.
        posterior = before
        if self.posterior_from == "local":
            with torch.no_grad():
                posterior = self.selector.posterior(broadcast.params | trained, pairs, pairs.mask)
        if self.privacy is not None:
            trained, posterior = silenced(broadcast.trainable, trained, posterior, names)
        require_finite(dict(posterior._asdict()), names, broadcast.round)
        self._check(trained, names, broadcast.round)
        update = Update(
            trained, result.losses, torch.ones(count), private,
            posterior if self.contract.posterior else None,
            self.store.sizes[clients].float(),
            self._own_moments(broadcast, posterior), labelled,
        )  # fmt: skip
        return self._answered(update)

    def _stacked(self, params: Params, clients: int) -> Params:
        return stack(params, clients)

    def _check(self, trained: Params, names: Sequence[str], round_number: int) -> None:
        require_finite(trained, names, round_number)

    def _answered(self, update: Update) -> Update:
        return update

    def _labels(
        self, broadcast: Broadcast, posterior: Posterior, label: Int[Tensor, "c"]
    ) -> tuple[Params, Float[Tensor, "c m"] | None]:
        """The prototype that pulls each client (M6): the server's choice, or by prices its own
        among the components."""
        if broadcast.price is None or broadcast.prior is None:
            return {"label": label}, None
        chosen = assignments(posterior.mean, broadcast.prior.mean, broadcast.price)
        return {"label": chosen.argmax(-1)}, chosen

    def _own_moments(self, broadcast: Broadcast, posterior: Posterior) -> Moments | None:
        if not self.contract.moments or broadcast.prior is None:
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
            else clipped_latent(self.privacy, mean, variance)
        )

    def _context(
        self, broadcast: Broadcast, clients: Int[Tensor, "c"], pairs: PairBatch,
        label: Int[Tensor, "c"],
    ) -> RoundContext:  # fmt: skip
        """What the clients make of what they were sent besides the parameters."""
        pulled = broadcast.round >= self.schedule.pull_start
        evidence = None
        if broadcast.anchors is not None:
            with torch.no_grad():
                evidence = self.selector.evidence(broadcast.params, broadcast.anchors, pairs)
        return RoundContext(
            prior=broadcast.prior,
            anchors=broadcast.anchors,
            evidence=evidence,
            label=label if pulled else torch.full_like(label, -1),
            client=clients if self.identity is None else self.identity[clients],
            kl_weight=self.schedule.beta(broadcast.round),
            pull_weight=self.schedule.pull_weight if pulled else 0.0,
        )

    @cached_property
    def withheld(self) -> Withheld:
        """Which pairs are kept from training."""
        return Withheld(self.store, self.local.seed, self.withhold_until)

    @torch.no_grad()
    def posteriors(
        self, params: Params, *, withhold: bool = False
    ) -> tuple[Int[Tensor, "c"], Posterior]:
        """Every client's posterior from all of its pairs, or without the withheld ones."""
        parts = [
            self.selector.posterior(params, pairs, pairs.mask & ~held)
            for pairs, held in self.withheld.blocks(withhold)
        ]
        return torch.arange(len(self.store)), Posterior(*map(self.withheld.in_order, zip(*parts)))

    @torch.no_grad()
    def moments(
        self, params: Params, centre: Float[Tensor, "t m d"], *, withhold: bool = False
    ) -> Moments:
        """Each client's moments under given centres, added up."""
        _, posterior = self.posteriors(params, withhold=withhold)
        mean, variance = self._bounded(posterior)
        if self.robust is None:
            return summed_moments(mean, variance, centre)
        return robust_moments(assignments(mean, centre), mean, variance, centre, self.robust)

    @torch.no_grad()
    def choice_scores(
        self, params: Params, populations: Sequence[Population]
    ) -> tuple[Float[Tensor, "k t"], Bool[Tensor, "k"]]:
        """Mean log-probability of every client's withheld choices under each population, and who
        withheld any."""
        parts, counted = [], []
        for pairs, held in self.withheld.blocks(withhold=True):
            context = pairs._replace(mask=pairs.mask & ~held)
            nobody = torch.full((pairs.mask.shape[0],), -1)
            columns = []
            for population in populations:
                served = VariationalPredictor(self.selector, params, population, "population")
                margin = served.margin(served.adapt(context, nobody), pairs)
                columns.append(-mean_choice_loss(margin, held.float()))
            parts.append(torch.stack(columns, -1))
            counted.append(held.any(-1))
        return self.withheld.in_order(parts), self.withheld.in_order(counted)

    def scores(self, params: Params, populations: Sequence[Population]) -> Scores:
        """Sums of the log-probabilities of all clients' withheld choices."""
        each, counted = self.choice_scores(params, populations)
        return summed_scores(each[counted])

    @torch.no_grad()
    def settle(self, params: Params, population: Population) -> Params:
        """The component of the greatest responsibility given all of a client's pairs."""
        labels = [
            self.selector.responsibilities(params, population, pairs, pairs.mask).argmax(-1)
            for pairs, _ in self.withheld.blocks(withhold=False)
        ]
        return {"label": self.withheld.in_order(labels)}


class PooledClients(SimulatedClients):
    """Clients whose pairs lie in one place: one model takes every step on all of them at once."""

    def _chunks(self, cohort: Sequence[int], sizes: list[int], per_client: int) -> list[Chunk]:
        return [Chunk(list(cohort), 0 if self.objective.single_pair else best_width(sizes, 0))]

    def _stacked(self, params: Params, clients: int) -> Params:
        return stack(params, 1)

    def _check(self, trained: Params, names: Sequence[str], round_number: int) -> None:
        require_finite(trained, ["all clients pooled"], round_number)

    def _answered(self, update: Update) -> Update:
        """One row that stands for everybody."""
        losses = {name: value.mean().view(1) for name, value in update.losses.items()}
        return update._replace(losses=losses, clients=update.clients.sum().view(1))


def build(
    *, config: Config, store: ClientStore, total: int, identity: Int[Tensor, "c"] | None = None
) -> SimulatedClients:
    """The clients of `store` (of `total` in all) under the settings.

    Raises:
        BadInputError: the settings do not go together.
    """
    return _build(SimulatedClients, config, store, total, identity, pooled=False)


def build_pooled(
    *, config: Config, store: ClientStore, total: int, identity: Int[Tensor, "c"] | None = None
) -> PooledClients:
    """The clients of `store`, with their pairs in one place.

    Raises:
        BadInputError: the settings do not go together.
    """
    found = _build(PooledClients, config, store, total, identity, pooled=True)
    assert isinstance(found, PooledClients)
    return found


def _build(
    kind: type[SimulatedClients], config: Config, store: ClientStore, total: int,
    identity: Int[Tensor, "c"] | None, *, pooled: bool,
) -> SimulatedClients:  # fmt: skip
    o, start = config.objective, config.prototypes_start
    selector, prior = build_selector(config), build_prior(config, total)
    decay = o.reward_decay if "objective.reward_decay" in settings_read(config) else 0.0
    if decay and not isinstance(selector.reward, DirectionalHead):
        raise BadInputError(
            f"objective.reward_decay: '{config.model.conditioning}' has no direction to decay; set"
            " it to 0, or choose model.conditioning bilinear"
        )
    objective = VariationalObjective(
        selector, prior, o.orthonormal_weight, config.prototypes.radius,
        config.federation.protocol == "single-pair", decay, o.samples,
    )  # fmt: skip
    schedule = Schedule(o.kl_weight, o.kl_schedule, o.kl_warmup_rounds, start, o.pull_weight)
    anchored = config.prototypes.kind == "anchored"
    withholds = anchored and modes_of(config) is None and start > 0 and not pooled
    return kind(
        store, selector, objective, build_local(config), build_simulation(config), schedule,
        contract_of(config, prior), config.federation.posterior_from,
        withhold_until=start if withholds else None, identity=identity,
        privacy=privacy_of(config, total),
        # a networked client is alone: the server averages
        robust=robust_of(config) if identity is None else None,
    )  # fmt: skip
