"""FedVPA-GP and its relatives: the federated variational preference selector (M1-M8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedvpa.federated.aggregation import ServerOptimiser, WeightedMean
from fedvpa.federated.algorithm import Payload, tensor_payload
from fedvpa.federated.client import LocalSettings, require_finite, stack, train_locally
from fedvpa.federated.draws import local_draws, stream
from fedvpa.federated.objective import PRIOR_LOGIT, PROTOTYPES, RoundContext, VariationalObjective, WithFixed
from fedvpa.federated.population import (
    MAX_MODES,
    balanced_labels,
    candidate_modes,
    choose_modes,
    fewest_within_error,
    fit_population,
)
from fedvpa.federated.simulation import Simulation
from fedvpa.federated.store import ClientStore, first_pairs, select
from fedvpa.functional.preference import mean_choice_loss, predictive_margin
from fedvpa.functional.prototypes import orthogonal_prototypes
from fedvpa.models.selector import Selector, refined_posterior
from fedvpa.types import MixturePrior, PairBatch, Params, Population, Posterior, ServerState

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
    prior: Literal["gaussian", "peers"] = "gaussian"
    prior_start: int = 0
    prior_members: Literal["known", "last-round"] = "known"
    prototypes: Literal["none", "learned", "fixed", "anchored"] = "none"
    prototypes_start: int = 0
    pull_weight: float = 1.0

    def beta(self, round_number: int) -> float:
        """KL weight of a round: constant, a linear warm-up, or one that starts anew every cycle (Fu et al., 2019)."""
        if self.kl_schedule == "constant":
            return self.kl_weight
        position = round_number % self.kl_warmup_rounds if self.kl_schedule == "cyclical" else round_number
        ramp = self.kl_warmup_rounds / 2 if self.kl_schedule == "cyclical" else self.kl_warmup_rounds
        return self.kl_weight * min(1.0, position / ramp)


class _Update(NamedTuple):
    """What a chunk of clients sends (parameters, posterior) and keeps (logits)."""

    params: Params
    posterior: Posterior
    logit: Tensor | None
    losses: dict[str, Tensor]


@dataclass(frozen=True)
class FederatedVariational:
    """Rounds over the clients of `store`. `centralised` pools them: one model takes every step on all clients at once."""

    store: ClientStore
    selector: Selector
    objective: VariationalObjective
    local: LocalSettings
    simulation: Simulation
    schedule: Schedule
    server: ServerOptimiser = field(default_factory=ServerOptimiser)
    aggregation: Literal["uniform", "samples"] = "uniform"
    posterior_from: Literal["broadcast", "local"] = "broadcast"
    modes: int | None = None
    max_components: int = 128
    inference: Literal["amortised", "population"] = "amortised"
    centralised: bool = False

    def init(self) -> ServerState:
        """Fresh parameters, nobody seen."""
        generator = stream(self.local.seed, "init")
        params = self.selector.init(generator)
        if self.schedule.prototypes in ("learned", "fixed"):
            assert self.modes is not None
            params[PROTOTYPES] = orthogonal_prototypes(
                self.modes, self.selector.encoder.latent, self.objective.radius, generator
            )
        count, latent = len(self.store), self.selector.encoder.latent
        clients: Params = {
            "mean": torch.zeros(count, latent),
            "log_var": torch.zeros(count, latent),
            "seen": torch.full((count,), -1, dtype=torch.long),
            "label": torch.full((count,), -1, dtype=torch.long),
        }
        if self._gumbel:
            clients["prior_logit"] = torch.zeros(count, self.peers.numel())
        return ServerState(0, params, self.server.init(self._shared(params)), clients, {})

    @property
    def _gumbel(self) -> bool:
        return self.schedule.prior == "peers" and self.objective.weights == "gumbel"

    @property
    def peers(self) -> Int[Tensor, "j"]:
        """Clients that may be components of the prior: all, or a fixed random subset of `max_components`."""
        count = len(self.store)
        if count <= self.max_components:
            return torch.arange(count)
        generator = stream(self.local.seed, "peers")
        return torch.randperm(count, generator=generator)[: self.max_components].sort().values

    def _shared(self, params: Params) -> Params:
        """Parameters that are trained and averaged (fixed prototypes are not)."""
        fixed = {PROTOTYPES} if self.schedule.prototypes == "fixed" else set()
        return {name: value for name, value in params.items() if name not in fixed}

    def prior(self, state: ServerState) -> MixturePrior | None:
        """The mixture that is broadcast in the coming round; None stands for N(0, I)."""
        if self.schedule.prior != "peers" or state.round < self.schedule.prior_start:
            return None
        peers = self.peers
        oldest = state.round - 1 if self.schedule.prior_members == "last-round" else 0
        slot = (state.clients["seen"][peers] >= max(0, oldest)).nonzero().squeeze(-1)
        if slot.numel() < (2 if self.objective.exclude_self else 1):
            return None
        client = peers[slot]
        return MixturePrior(
            state.clients["mean"][client],
            state.clients["log_var"][client],
            self.store.sizes[client].float(),
            client,
            slot,
        )

    def context(self, state: ServerState, clients: Int[Tensor, "c"], pairs: PairBatch) -> RoundContext:
        """What these clients are sent besides the parameters, and what they make of it."""
        started = state.round >= self.schedule.prototypes_start
        anchored = self.schedule.prototypes == "anchored" and started and bool(state.population)
        anchors = Population(**state.population) if anchored else None
        with torch.no_grad():
            evidence = None if anchors is None else self.selector.evidence(state.params, anchors, pairs)
        label = state.clients["label"][clients]
        return RoundContext(
            prior=self.prior(state),
            anchors=anchors,
            evidence=evidence,
            label=label if started else torch.full_like(label, -1),
            client=clients,
            kl_weight=self.schedule.beta(state.round),
            pull_weight=self.schedule.pull_weight if started else 0.0,
        )

    def local_round(self, state: ServerState, chunk: Sequence[int]) -> _Update:
        """Train these clients side by side from the state's parameters."""
        clients = torch.tensor(chunk)
        names = [self.store.names[c] for c in chunk]
        pairs, held = self._withheld(clients, state.round + 1)
        if held.any():
            kept = pairs.mask & ~held
            pairs = first_pairs(pairs._replace(mask=kept), int(kept.sum(-1).max()))
        context = self.context(state, clients, pairs)
        params = stack(state.params, 1 if self.centralised else len(chunk))
        fixed = {name: value for name, value in params.items() if name not in self._shared(params)}
        trainable = self._shared(params)
        if self._gumbel and context.prior is not None:
            trainable[PRIOR_LOGIT] = state.clients["prior_logit"][clients]
        result = train_locally(
            WithFixed(self.objective, fixed), trainable, pairs, names, state.round, self.local, context,
            check_each_step=self.simulation.debug,
        )  # fmt: skip
        trained = dict(result.params)
        logit = trained.pop(PRIOR_LOGIT, None)
        with torch.no_grad():
            source = state.params if self.posterior_from == "broadcast" else trained
            posterior = self.selector.posterior(source, pairs, pairs.mask)
        checked = dict(posterior._asdict()) | (trained if not self.centralised else {})
        require_finite(checked, names, state.round)
        return _Update(trained, posterior, logit, result.losses)

    def apply(self, state: ServerState, cohort: Sequence[int]) -> tuple[ServerState, dict[str, float]]:
        """One round (M8).

        Raises:
            NonFiniteUpdateError: a client's update holds NaN or Inf; the state is left as it was.
        """
        per_client = sum(value.numel() for value in state.params.values())
        chunks = [list(cohort)] if self.centralised else self.simulation.chunks(cohort, per_client)
        shared = self._shared(state.params)
        mean, sums = WeightedMean(), dict[str, float]()
        clients = {name: table.clone() for name, table in state.clients.items()}
        for chunk, update in zip(chunks, self.simulation.map(lambda c: self.local_round(state, c), chunks)):
            index = torch.tensor(chunk)
            weight = torch.ones(len(chunk)) if self.aggregation == "uniform" else self.store.sizes[index].float()
            mean.add(shared, update.params, torch.ones(1) if self.centralised else weight)
            clients["mean"][index], clients["log_var"][index] = update.posterior
            clients["seen"][index] = state.round
            if update.logit is not None:
                clients["prior_logit"][index] = update.logit
            for name, value in update.losses.items():
                sums[name] = sums.get(name, 0.0) + float(value.sum())
        params, slots = self.server.apply(shared, state.optimiser, mean.mean())
        if self.centralised:
            require_finite(stack(params, 1), ["all clients pooled"], state.round)
        new = ServerState(state.round + 1, state.params | params, slots, clients, state.population)
        return self._after_round(new), {name: value / len(cohort) for name, value in sums.items()}

    def _after_round(self, state: ServerState) -> ServerState:
        """New labels (M6); anchors once their time has come."""
        kind = self.schedule.prototypes
        seen = (state.clients["seen"] >= 0).nonzero().squeeze(-1)
        if kind == "anchored" and not state.population and state.round >= self.schedule.prototypes_start and seen.numel():
            # one exchange of fresh posteriors: those of earlier rounds come from other encoders
            modes = self._modes_by_prediction(state, seen) if self.modes is None else self.modes
            return replace(
                state, population=fit_population(self.posteriors(state).mean[seen], modes, self.local.seed)._asdict()
            )
        if kind in ("learned", "fixed") and state.round >= self.schedule.prototypes_start:
            label = torch.full_like(state.clients["label"], -1)
            label[seen] = balanced_labels(state.clients["mean"][seen], state.params[PROTOTYPES], self.local.seed)
            return replace(state, clients=state.clients | {"label": label})
        return state

    def _withheld(self, clients: Int[Tensor, "c"], round_number: int) -> tuple[PairBatch, Bool[Tensor, "c n"]]:
        """The clients' pairs, and which of them are kept out of training until the anchors are fitted: a fifth, drawn once,
        where the number of anchors has yet to be found. Withheld pairs come last."""
        pairs = self.store.batch(clients)
        none = torch.zeros_like(pairs.mask)
        anchored = self.schedule.prototypes == "anchored" and round_number <= self.schedule.prototypes_start
        if self.modes is not None or not anchored or self.centralised:
            return pairs, none
        sizes = pairs.mask.sum(-1)
        names = [self.store.names[c] for c in clients.tolist()]
        order = local_draws(self.local.seed, -1, names, sizes, 1, 0, 0, 0).order[:, 0]
        kept = sizes - torch.where(sizes < SMALLEST_DIVIDED, 0, (WITHHELD * sizes).round().long().clamp_min(1))
        column = torch.arange(order.shape[-1])
        held = (column >= kept.unsqueeze(-1)) & (column < sizes.unsqueeze(-1))
        return select(pairs, order, column < sizes.unsqueeze(-1)), held

    @torch.no_grad()
    def _modes_by_prediction(self, state: ServerState, clients: Int[Tensor, "c"]) -> int:
        """Number of components whose posterior predictive gives the clients' withheld choices the most probability: the
        fewest within two standard errors of it. A client sends one number for each number that is tried."""
        pairs, held = self._withheld(clients, state.round)
        mean = self.selector.posterior(state.params, pairs, pairs.mask & ~held).mean
        counted = held.any(-1)
        if not counted.any():
            return choose_modes(mean.double().numpy(), self.local.seed)
        scores = []
        for count in candidate_modes(mean):
            population = fit_population(mean, count, self.local.seed)
            margin = self.selector.component_margins(state.params, population, pairs)
            share = self.selector.combine(population, logsigmoid(margin), mean, pairs.mask & ~held)
            scores.append(-mean_choice_loss(predictive_margin(share, margin), held.float())[counted])
        return candidate_modes(mean)[fewest_within_error(torch.stack(scores, -1))]

    def posteriors(self, state: ServerState) -> Posterior:
        """Every client's posterior from all of its pairs, under the state's model [K, d]."""
        everyone = list(range(len(self.store)))
        parts = []
        with torch.no_grad():
            for at in range(0, len(everyone), 1000):
                pairs = self.store.batch(everyone[at : at + 1000])
                parts.append(self.selector.posterior(state.params, pairs, pairs.mask))
        return Posterior(torch.cat([p.mean for p in parts]), torch.cat([p.log_var for p in parts]))

    def finalise(self, state: ServerState) -> ServerState:
        """One more exchange of posteriors, under the final model; the population is fitted to them unless it is anchored."""
        posterior = self.posteriors(state)
        clients = state.clients | {"mean": posterior.mean, "log_var": posterior.log_var}
        state = replace(state, clients=clients | {"seen": torch.full_like(state.clients["seen"], state.round)})
        if self.schedule.prototypes == "anchored" and state.population:
            return state
        modes = choose_modes(posterior.mean.double().numpy(), self.local.seed) if self.modes is None else self.modes
        return replace(state, population=fit_population(posterior.mean, modes, self.local.seed)._asdict())

    def predictor(self, state: ServerState) -> VariationalPredictor:
        """The selector under the state's parameters."""
        population = Population(**state.population) if state.population else None
        return VariationalPredictor(self.selector, state.params, population, self.inference)

    def payload(self, state: ServerState) -> list[Payload]:
        """All that travels; a client's pairs, features, prior logits and optimiser state do not."""
        latent = self.selector.encoder.latent
        rows = tensor_payload(state.params, "down")
        if self.schedule.prior == "peers":
            k = min(self.max_components, len(self.store))
            rows.append(
                Payload("prior: peers' means, log-variances, sizes, ids", (k, 2 * latent + 2), k * (8 * latent + 12), "down")
            )
        if self.schedule.prototypes in ("learned", "fixed"):
            rows.append(Payload("label", (), 8, "down"))
        if self.schedule.prototypes == "anchored" and state.population:
            rows += tensor_payload(state.population, "down", "anchors.")
            rows.append(Payload("posterior under the model that is anchored", (2, latent), 8 * latent, "up", "once"))
            if self.modes is None:
                tried = sum(range(2, MAX_MODES + 1))  # components of all populations
                size = (tried, latent + 2)
                rows.append(Payload("populations to choose from, at most", size, 4 * tried * (latent + 2), "down", "once"))
                answers = (MAX_MODES - 1,)
                rows.append(Payload("log-probability of withheld choices", answers, 4 * (MAX_MODES - 1), "up", "once"))
        rows += tensor_payload(self._shared(state.params), "up", "delta.")
        rows.append(Payload("posterior: mean, log-variance", (2, latent), 8 * latent, "up"))
        rows.append(Payload("posterior under the final model", (2, latent), 8 * latent, "up", "once"))
        rows.append(Payload("number of pairs", (), 8, "up"))
        return rows


@dataclass(frozen=True)
class VariationalPredictor:
    """A trained selector; a user's state is z, or its posterior over the population's components."""

    selector: Selector
    params: Params
    population: Population | None
    inference: Literal["amortised", "population"] = "amortised"

    @torch.no_grad()
    def amortised(self, context: PairBatch) -> Posterior:
        """The encoder's posterior; of an empty context it is N(0, I)."""
        posterior = self.selector.posterior(self.params, context, context.mask)
        empty = ~context.mask.any(-1, keepdim=True)
        return Posterior(*(value.masked_fill(empty, 0.0) for value in posterior))

    @torch.no_grad()
    def responsibilities(self, context: PairBatch) -> Float[Tensor, "u m"]:
        """Posterior over the fitted components given each user's context.

        Raises:
            ValueError: no population has been fitted yet.
        """
        if self.population is None:
            raise ValueError("no population has been fitted yet")
        return self.selector.responsibilities(self.params, self.population, context, context.mask)

    def posterior(self, context: PairBatch) -> Posterior:
        """Amortised, or refined by the population."""
        if self._mixes and self.population is not None:
            return refined_posterior(self.responsibilities(context), self.population)
        return self.amortised(context)

    def adapt(self, context: PairBatch, group: Int[Tensor, "u"]) -> Float[Tensor, "u s"]:
        """State of each user: shares of the components with population inference, else z; the true group is not read."""
        return self.responsibilities(context) if self._mixes else self.amortised(context).mean

    @torch.no_grad()
    def margin(self, state: Float[Tensor, "u s"], target: PairBatch) -> Float[Tensor, "u n"]:
        """Log-odds of the choices: the posterior predictive over the components, or the reward's margin under z."""
        if self._mixes and self.population is not None:
            each = self.selector.component_margins(self.params, self.population, target)
            return predictive_margin(state, each)
        return self.margin_under(state, target)

    @torch.no_grad()
    def margin_under(self, z: Float[Tensor, "u d"], target: PairBatch) -> Float[Tensor, "u n"]:
        """Margins of the reward under z."""
        return self.selector.margin(self.params, z, target)

    def neutral(self, users: int) -> Float[Tensor, "u s"]:
        """State of somebody of whom nothing is known."""
        if self._mixes and self.population is not None:
            return self.population.weight.expand(users, -1)
        return torch.zeros(users, self.selector.encoder.latent)

    def prior_mean(self) -> Float[Tensor, "d"]:
        """z of somebody of whom nothing is known: the population's mean where it is used, else zero."""
        if self._mixes and self.population is not None:
            return self.population.weight @ self.population.mean
        return torch.zeros(self.selector.encoder.latent)

    @property
    def _mixes(self) -> bool:
        return self.inference == "population" and self.population is not None
