"""FedVPA-GP and its relatives: the federated variational preference selector (M1-M8), seen from the
server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Literal

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedvpa.federated.aggregators import RobustMean, ServerOptimiser, WeightedMean
from fedvpa.federated.algorithm import Payload
from fedvpa.federated.clients import Broadcast, Participants, Schedule
from fedvpa.federated.components import (
    Moments,
    adjusted_price,
    best_separated,
    fit,
    mixture,
    population,
)
from fedvpa.federated.draws import stream
from fedvpa.federated.local import require_finite, stack
from fedvpa.federated.manifest import payload_rows
from fedvpa.federated.objective import PROTOTYPES, VariationalObjective
from fedvpa.federated.population import (
    MAX_MODES,
    balanced_labels,
    candidate_modes,
    choose_modes,
    fewest_within_error,
    fit_population,
)
from fedvpa.federated.privacy import Normal, Privacy, secret_normal, seeded_normal
from fedvpa.functional.prototypes import orthogonal_prototypes
from fedvpa.selector.predictor import VariationalPredictor
from fedvpa.selector.selector import Selector
from fedvpa.types import MixturePrior, Params, Population, Posterior, ServerState


@dataclass(frozen=True)
class FederatedVariational:
    """Rounds over some participants: in this process, or across a network.

    With the prior `components` the server asks for sums over clients alone; with the others it sees
    every client's posterior.
    """

    participants: Participants
    selector: Selector
    objective: VariationalObjective
    seed: int
    schedule: Schedule
    server: ServerOptimiser = field(default_factory=ServerOptimiser)
    aggregation: Literal["uniform", "samples"] = "uniform"
    modes: int | None = None
    max_components: int = 128
    inference: Literal["amortised", "population"] = "amortised"
    centralised: bool = False
    aggregator: Literal["mean", "trimmed-mean", "median", "krum"] = "mean"
    trim: float = 0.2
    max_norm: float = 0.0
    privacy: Privacy | None = None
    secret: bool = False
    together: bool = False

    def noise(self, *name: object) -> Normal:
        """Draws a release's noise: repeatable in a simulation, of the system's entropy in a
        federation (`secret`)."""
        return secret_normal if self.secret else seeded_normal(stream(self.seed, "noise", *name))

    def init(self) -> ServerState:
        """Fresh parameters, nobody seen."""
        generator = stream(self.seed, "init")
        params = self.selector.init(generator)
        if self.schedule.orthogonal:
            assert self.modes is not None
            params[PROTOTYPES] = orthogonal_prototypes(
                self.modes, self.selector.encoder.latent, self.objective.radius, generator
            )
        number, latent = len(self.participants), self.selector.encoder.latent
        clients: Params = {
            "mean": torch.zeros(number, latent),
            "log_var": torch.zeros(number, latent),
            "seen": torch.full((number,), -1, dtype=torch.long),
            "label": torch.full((number,), -1, dtype=torch.long),
        }
        if self.gumbel:
            clients["prior_logit"] = torch.zeros(number, self.most_components)
        if self.counted:
            clients["size"] = torch.zeros(number)
        return ServerState(0, params, self.server.init(self.shared(params)), clients, {})

    @property
    def by_sums(self) -> bool:
        """Whether the population is fitted from sums over clients alone."""
        return self.schedule.prior == "components"

    @property
    def gumbel(self) -> bool:
        """Whether clients learn weights of the prior's components (M4)."""
        mixes = self.schedule.prior == "peers" or (self.by_sums and not self.schedule.anchored)
        return mixes and self.objective.weights == "gumbel"

    @property
    def most_components(self) -> int:
        """Columns of a client's table of prior logits."""
        if not self.by_sums:
            return int(self.peers.numel())
        return self.modes if self.modes is not None else MAX_MODES

    @property
    def peers(self) -> Int[Tensor, "j"]:
        """Clients that may be components of the prior: all, or a fixed random subset of
        `max_components`."""
        count = len(self.participants)
        if count <= self.max_components:
            return torch.arange(count)
        generator = stream(self.seed, "peers")
        return torch.randperm(count, generator=generator)[: self.max_components].sort().values

    def shared(self, params: Params) -> Params:
        """Parameters that are trained and averaged (fixed prototypes are not)."""
        fixed = {PROTOTYPES} if self.schedule.prototypes == "fixed" else set()
        return {name: value for name, value in params.items() if name not in fixed}

    def prior(self, state: ServerState) -> MixturePrior | None:
        """The mixture that is broadcast in the coming round; None stands for N(0, I)."""
        if self.schedule.prior == "gaussian" or state.round < self.schedule.prior_start:
            return None
        if self.by_sums:
            return mixture(_moments(state)) if state.components else None
        peers = self.peers
        oldest = state.round - 1 if self.schedule.prior_members == "last-round" else 0
        slot = (state.clients["seen"][peers] >= max(0, oldest)).nonzero().squeeze(-1)
        if slot.numel() < (2 if self.objective.exclude_self else 1):
            return None
        client = peers[slot]
        size = (
            state.clients["size"][client] if "size" in state.clients else torch.ones(client.numel())
        )
        return MixturePrior(
            state.clients["mean"][client], state.clients["log_var"][client], size, client, slot
        )

    def broadcast(self, state: ServerState) -> Broadcast:
        """What every client of the coming round is sent."""
        started = state.round >= self.schedule.prototypes_start
        anchored = self.schedule.anchored and started and bool(state.population)
        priced = self.by_sums and self.schedule.orthogonal and started
        return Broadcast(
            state.round,
            state.params,
            self.prior(state),
            Population(**state.population) if anchored else None,
            state.components.get("price") if priced else None,
            tuple(name for name in state.params if name not in self.shared(state.params)),
            self.by_sums and not self.schedule.anchored,
        )

    def apply(
        self, state: ServerState, cohort: Sequence[int]
    ) -> tuple[ServerState, dict[str, float]]:
        """One round (M8).

        Raises:
            NonFiniteUpdateError: a client's update holds NaN or Inf; the state is left as it was.
        """
        if self.privacy is not None:
            self.privacy.require(state.round + 1, self.planned_fits)
        shared = self.shared(state.params)
        mean, sums, answered = self._aggregator(), dict[str, float](), 0
        clients = {name: table.clone() for name, table in state.clients.items()}
        found: Moments | None = None
        labelled: Tensor | None = None
        for index, update in (
            self.participants.train(self.broadcast(state), cohort, state.clients) if cohort else ()
        ):
            many = update.together or 1
            answered += index.numel()
            if update.size is not None and self.counted:
                clients["size"][index] = update.size
            weight = (
                torch.ones(index.numel())
                if self.aggregation == "uniform"
                else clients["size"][index]
            )
            if update.together or self.centralised:
                weight = torch.full((1,), float(many))
            mean.add(shared, update.params, weight)
            for name, rows in update.private.items():
                clients[name][index] = rows
            if update.posterior is not None:
                clients["mean"][index], clients["log_var"][index] = update.posterior
            # who took part is private, too
            clients["seen"][index if self.privacy is None else slice(None)] = state.round
            if update.moments is not None:
                part = Moments(*(value.sum(0) for value in update.moments))
                found = part if found is None else found.plus(part)
            if update.labelled is not None:
                part_labelled = update.labelled.sum(0)
                labelled = part_labelled if labelled is None else labelled + part_labelled
            for name, value in update.losses.items():
                sums[name] = sums.get(name, 0.0) + many * float(value.sum())
        step, found, labelled = self._released(state, mean, found, labelled)
        params, slots = self.server.apply(shared, state.optimiser, step)
        if self.centralised:
            require_finite(stack(params, 1), ["all clients pooled"], state.round)
        components = state.components if found is None else self._refitted(state, found, labelled)
        new = ServerState(
            state.round + 1, state.params | params, slots, clients, state.population, components
        )
        row = {name: value / answered for name, value in sums.items() if answered}
        if self.privacy is not None:
            row["epsilon"] = self.privacy.epsilon(new.round, self.planned_fits)
        return self._after_round(new), row

    def _aggregator(self) -> WeightedMean | RobustMean:
        if self.aggregator == "mean":
            bounds = [
                b
                for b in (
                    self.max_norm,
                    self.privacy.clip if self.privacy and not self.together else 0.0,
                )
                if b
            ]
            return WeightedMean(max_norm=min(bounds, default=0.0))
        return RobustMean(self.aggregator, self.trim, self.max_norm)

    def _released(
        self,
        state: ServerState,
        mean: WeightedMean | RobustMean,
        found: Moments | None,
        labelled: Tensor | None,
    ) -> tuple[Params, Moments | None, Tensor | None]:
        """What is made of the round's contributions: their mean, or with privacy their noised sums
        (also of nobody)."""
        if self.privacy is None:
            return mean.mean(), found, labelled
        assert isinstance(mean, WeightedMean)
        draw = self.noise("round", state.round)
        sums = mean.sums or {
            name: torch.zeros_like(value) for name, value in self.shared(state.params).items()
        }
        noised = self.privacy.noised_params(sums, draw)
        if found is not None:
            found = self.privacy.noised_moments(found, draw, fit=False)
        if labelled is not None:
            labelled = self.privacy.noised_choices(labelled, draw)
        return (
            {name: value / self.privacy.expected for name, value in noised.items()},
            found,
            labelled,
        )

    @property
    def planned_fits(self) -> int:
        """Fits of components that a whole run releases; they count from the first round on."""
        return 1 if self.schedule.anchored else 2

    def _after_round(self, state: ServerState) -> ServerState:
        """Anchors, components of the prior, or new labels (M6), once their time has come."""
        started = state.round >= self.schedule.prototypes_start
        seen = (state.clients["seen"] >= 0).nonzero().squeeze(-1)
        if self.schedule.anchored:
            if state.population or not started or not seen.numel():
                return state
            # one exchange of fresh posteriors: those of earlier rounds come from other encoders
            return replace(state, population=self._anchors(state, seen)._asdict())
        if self.by_sums:
            due = (
                not state.components
                and state.round >= max(1, self.schedule.prior_start)
                and seen.numel()
            )
            return replace(state, components=self._components(state)) if due else state
        if self.schedule.orthogonal and started:
            label = torch.full_like(state.clients["label"], -1)
            label[seen] = balanced_labels(
                state.clients["mean"][seen], state.params[PROTOTYPES], self.seed
            )
            return replace(state, clients=state.clients | {"label": label})
        return state

    def _anchors(self, state: ServerState, seen: Int[Tensor, "k"]) -> Population:
        """Components fitted to the clients' posteriors under the present model, as many as the
        clients' choices ask for."""
        if self.by_sums:
            return population(self._fitted(state))
        if self.modes is not None:
            return fit_population(self._means(state, seen), self.modes, self.seed)
        mean = self._means(state, seen, withhold=True)
        candidates = {
            count: fit_population(mean, count, self.seed) for count in candidate_modes(mean)
        }
        count = self._predicted(state, candidates)
        if count is None:
            return fit_population(mean, choose_modes(mean.double().numpy(), self.seed), self.seed)
        return fit_population(self._means(state, seen), count, self.seed)

    def _means(
        self, state: ServerState, seen: Int[Tensor, "k"], *, withhold: bool = False
    ) -> Float[Tensor, "k d"]:
        """Fresh posterior means of those who have been seen."""
        index, posterior = self.participants.posteriors(state.params, withhold=withhold)
        return posterior.mean[torch.isin(index, seen)]

    def _predicted(self, state: ServerState, candidates: dict[int, Population]) -> int | None:
        """Number of components whose posterior predictive gives the clients' withheld choices
        the most probability: the fewest within two standard errors of it, from sums over
        clients. None where nobody withheld any."""
        scores = self.participants.scores(state.params, list(candidates.values()))
        if float(scores.clients) == 0:
            return None
        return list(candidates)[fewest_within_error(scores)]

    def _fitted(self, state: ServerState) -> Moments:
        """Moments of components fitted from sums: as many as were asked for, as the withheld
        choices want (anchored), or as are best separated."""
        latent = self.selector.encoder.latent

        releases = count()

        def ask(centre: Tensor, withhold: bool = False) -> Moments:
            found = self.participants.moments(state.params, centre, withhold=withhold)
            if self.privacy is None:
                return found
            return self.privacy.noised_moments(
                found, self.noise("fit", state.round, next(releases)), fit=True
            )

        if self.privacy is not None:
            assert self.modes is not None
            numbers = [self.modes]
            return fit(
                ask,
                latent,
                numbers,
                self.seed,
                restarts=self.privacy.fit_starts,
                iterations=self.privacy.fit_iterations,
                least=3 * self.privacy.fit_noise,
            )[self.modes]
        if self.modes is not None:
            return fit(ask, latent, [self.modes], self.seed)[self.modes]
        numbers = list(range(2, min(MAX_MODES, len(self.participants) // 3) + 1)) or [1]
        fits = fit(lambda centre: ask(centre, withhold=True), latent, numbers, self.seed)
        chosen = None
        if self.schedule.anchored and not state.population:
            chosen = self._predicted(
                state, {number: population(found) for number, found in fits.items()}
            )
        if chosen is None:
            chosen = best_separated(fits)
        start = fits[chosen].total / fits[chosen].weight.clamp_min(1e-9).unsqueeze(-1)
        return fit(ask, latent, [chosen], self.seed, start)[chosen]

    def _components(self, state: ServerState) -> Params:
        """The prior's components, and prices of nothing; with orthogonal prototypes in the order of
        those they stand for."""
        found = self._fitted(state)
        if PROTOTYPES in state.params:
            centre = found.total / found.weight.clamp_min(1e-9).unsqueeze(-1)
            unit = torch.nn.functional.normalize
            rows, columns = linear_sum_assignment(
                -(unit(centre, dim=-1) @ unit(state.params[PROTOTYPES], dim=-1).T).numpy()
            )
            order = torch.empty(len(rows), dtype=torch.long)
            order[torch.as_tensor(columns)] = torch.as_tensor(rows)
            found = Moments(*(value[order] for value in found))
        return dict(found._asdict()) | {"price": torch.zeros_like(found.weight)}

    def _refitted(self, state: ServerState, found: Moments, labelled: Tensor | None) -> Params:
        """One step of EM on the cohort's moments; a component that nobody of the cohort fell to
        stays. Prices follow."""
        before = _moments(state)
        kept = found.weight > (3 * self.privacy.noise if self.privacy is not None else 0)
        merged = Moments(
            *(torch.where(kept.view(-1, *[1] * (b.dim() - 1)), f, b) for f, b in zip(found, before))
        )
        price = state.components["price"]
        return dict(merged._asdict()) | {
            "price": price if labelled is None else adjusted_price(price, labelled, merged)
        }

    def posteriors(self, state: ServerState) -> Posterior:
        """Every client's posterior from all of its pairs, under the state's model [K, d]."""
        return self.participants.posteriors(state.params)[1]

    def finalise(self, state: ServerState) -> ServerState:
        """The population is fitted to the clients under the final model, unless it is anchored.
        Where the server sees posteriors, clients send them once more."""
        if self.by_sums:
            if self.privacy is not None and not state.population:
                self.privacy.require(state.round, self.planned_fits)
            if not state.population:
                state = replace(state, population=population(self._fitted(state))._asdict())
            own = self.participants.settle(state.params, Population(**state.population))
            return replace(state, clients=state.clients | own)
        index, posterior = self.participants.posteriors(state.params)
        clients = {name: table.clone() for name, table in state.clients.items()}
        clients["mean"][index], clients["log_var"][index] = posterior
        clients["seen"][index] = state.round
        state = replace(state, clients=clients)
        if self.schedule.anchored and state.population:
            return state
        modes = (
            choose_modes(posterior.mean.double().numpy(), self.seed)
            if self.modes is None
            else self.modes
        )
        return replace(state, population=fit_population(posterior.mean, modes, self.seed)._asdict())

    def predictor(self, state: ServerState) -> VariationalPredictor:
        """The selector under the state's parameters."""
        found = Population(**state.population) if state.population else None
        return VariationalPredictor(self.selector, state.params, found, self.inference)

    def payload(self, state: ServerState) -> list[Payload]:
        """All that travels; a client's pairs, features, prior logits and optimiser state do not."""
        return payload_rows(self, state)

    @property
    def sends_posterior(self) -> bool:
        """Whether clients send their posterior every round."""
        return self.schedule.sends_posterior

    @property
    def counted(self) -> bool:
        """Whether clients tell how many pairs they have."""
        return self.aggregation == "samples" or (
            self.schedule.prior == "peers" and self.objective.weights == "sample-size"
        )


def _moments(state: ServerState) -> Moments:
    return Moments(*(state.components[name] for name in Moments._fields))
