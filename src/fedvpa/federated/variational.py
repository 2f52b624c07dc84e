"""FedVPA-GP and its relatives: the federated variational preference selector (M1-M8), seen from the
server.

A round is made of parts: a `Prior` of z, `Prototypes`, an `Aggregator` of updates, a `Release` that
lets through what may be known, and a `PopulationFit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedvpa.config import Config
from fedvpa.federated.accounting import privacy_of
from fedvpa.federated.aggregators import (
    Aggregator,
    RobustMean,
    ServerOptimiser,
    Total,
    build_aggregator,
    build_server,
)
from fedvpa.federated.algorithm import Clients
from fedvpa.federated.batch import Roster
from fedvpa.federated.components import Moments
from fedvpa.federated.exchanges import EVERY_ROUND, FITTED, Payload, loss_terms, payload_rows
from fedvpa.federated.messages import PROTOTYPES, Broadcast, Contract, Update
from fedvpa.federated.population import MAX_MODES, PopulationFit, build_fit, modes_of
from fedvpa.federated.priors import Prior, build_prior
from fedvpa.federated.prototypes import Prototypes, build_prototypes
from fedvpa.federated.random import stream
from fedvpa.federated.release import NoiseOf, Release, Sums, build_release, seeded_noise
from fedvpa.federated.robust import from_each, robust_moments
from fedvpa.selector.predictor import VariationalPredictor
from fedvpa.selector.selector import Selector, build_selector
from fedvpa.types import Params, Population, ServerState


@dataclass(frozen=True)
class FederatedVariational:
    """The server of a variational method; `clients` (see `Clients`) are an argument."""

    selector: Selector
    prior: Prior
    prototypes: Prototypes
    fit: PopulationFit
    aggregator: Aggregator
    release: Release
    server: ServerOptimiser
    contract: Contract
    seed: int
    aggregation: Literal["uniform", "samples"] = "uniform"
    inference: Literal["amortised", "population"] = "amortised"
    modes: int | None = None

    def init(self, roster: Roster) -> ServerState:
        """Fresh parameters, nobody seen."""
        generator = stream(self.seed, "init")
        params = self.selector.init(generator)
        params |= self.prototypes.init(generator)
        number, latent = len(roster.names), self.selector.encoder.latent
        tables: Params = {
            "mean": torch.zeros(number, latent),
            "log_var": torch.zeros(number, latent),
            "seen": torch.full((number,), -1, dtype=torch.long),
            "label": torch.full((number,), -1, dtype=torch.long),
        }
        if self.prior.columns:
            tables["prior_logit"] = torch.zeros(number, self.prior.columns)
        if self.contract.size:
            tables["size"] = torch.zeros(number)
        return ServerState(0, params, self.server.init(self._trained(params)), tables, {})

    def _trained(self, params: Params) -> Params:
        """Parameters that are trained and averaged (fixed prototypes are not)."""
        return {n: value for n, value in params.items() if n not in self.prototypes.fixed}

    def broadcast(self, state: ServerState) -> Broadcast:
        """What every client of the coming round is sent."""
        return Broadcast(
            state.round,
            state.params,
            self.prior.broadcast(state),
            self.prototypes.anchors(state),
            self.prototypes.price(state),
            self.prototypes.fixed,
        )

    def apply(
        self, state: ServerState, clients: Clients, cohort: Sequence[int]
    ) -> tuple[ServerState, dict[str, float]]:
        """One round (M8).

        Raises:
            NonFiniteUpdateError: a client's update holds NaN or Inf; the state is left as it was.
            BudgetError: the privacy budget does not allow the round.
        """
        # 1. What this round will release must be allowed before any client is asked.
        self.release.require(state.round + 1)
        # 2. Local rounds. Updates are added in the order of the cohort, so that a run repeats.
        start, total, sums = self._trained(state.params), Total(), Sums()
        each, robust = list[Moments](), self.robust
        tables = {name: table.clone() for name, table in state.clients.items()}
        losses, answered = dict[str, float](), 0
        broadcast = self.broadcast(state)
        for index, update in clients.train(broadcast, cohort, state.clients) if cohort else ():
            self._note(tables, index, update, state.round)
            weight = self._weight(tables, index, update)
            total = self.aggregator.add(total, start, update.params, weight)
            sums = sums.plus(None if robust else update.moments, update.labelled)
            each += [update.moments] if robust and update.moments is not None else []
            for name, value in update.losses.items():
                losses[name] = losses.get(name, 0.0) + float((update.clients * value).sum())
            answered += index.numel()
        if robust is not None and each and broadcast.prior is not None:
            found = robust_moments(*from_each(each), broadcast.prior.mean, robust)
            sums = sums._replace(moments=found)
        # 3. From here on only what the release lets through is read.
        step, sums = self.release.update(self.aggregator, total, start, sums, state.round)
        params, slots = self.server.apply(start, state.optimiser, step)
        state = replace(
            state, round=state.round + 1, params=state.params | params, optimiser=slots,
            clients=tables,
        )  # fmt: skip
        # 4. The prior follows the clients; prior and prototypes may begin, and then ask everybody.
        state = self.prior.refitted(state, *sums, self.release)
        state = self.prior.begun(state, clients, self.release)
        state = self.prototypes.after_round(state, clients, self.release)
        row = {name: value / answered for name, value in losses.items() if answered}
        return state, row | self.release.row(state.round)

    def _note(
        self, tables: Params, index: Int[Tensor, "c"], update: Update, round_number: int
    ) -> None:
        """Write down what the clients told of themselves."""
        if update.size is not None and self.contract.size:
            tables["size"][index] = update.size
        for name, rows in update.private.items():
            tables[name][index] = rows
        if update.posterior is not None:
            tables["mean"][index], tables["log_var"][index] = update.posterior
        # who took part is private, too
        tables["seen"][slice(None) if self.release.hides_cohort else index] = round_number

    def _weight(
        self, tables: Params, index: Int[Tensor, "c"], update: Update
    ) -> Float[Tensor, "r"]:
        """Weights of the update's rows: how many clients each stands for, or their pairs."""
        alone = update.clients.numel() == index.numel()
        by_size = self.aggregation == "samples" and alone
        return tables["size"][index] if by_size else update.clients

    @property
    def robust(self) -> RobustMean | None:
        """The aggregator, if it withstands attackers."""
        return self.aggregator if isinstance(self.aggregator, RobustMean) else None

    def finalise(self, state: ServerState, clients: Clients) -> ServerState:
        """The population is fitted to the clients under the final model, unless it is anchored."""
        return self.fit.finalise(state, clients, self.release)

    def predictor(self, state: ServerState) -> VariationalPredictor:
        """The selector under the state's parameters."""
        found = Population(**state.population) if state.population else None
        return VariationalPredictor(self.selector, state.params, found, self.inference)

    def payload(self, state: ServerState) -> list[Payload]:
        """All that travels; a client's pairs, features, prior logits and optimiser state do not."""
        anchored = self.prototypes.anchored
        priced = self.prior.summed and PROTOTYPES in state.params
        mixes = self.prior.most > 0
        holds = {
            "losses": self.contract.losses, "posterior": self.contract.posterior,
            "size": self.contract.size, "moments": self.contract.moments, "prior": mixes,
            "anchors": anchored, "price": priced, "choices": priced,
            "label": self.prototypes.labelled,
        }  # fmt: skip
        found = self.modes is None
        modes = MAX_MODES if self.modes is None else self.modes
        sizes = {"d": self.selector.encoder.latent, "m": modes, "k": self.prior.most}
        starts = self.release.limits.restarts * (MAX_MODES - 1 if found else 1)
        tried = {"t": MAX_MODES - 1, "m": sum(range(2, MAX_MODES + 1))}
        kinds = {"train": (EVERY_ROUND, sizes)}
        if self.prior.summed:
            exchanges = f"{self.release.limits.iterations + 2} exchanges {FITTED}"
            kinds |= {"moments": (exchanges, sizes | {"t": starts})}
        else:
            kinds |= {"posterior": (f"{FITTED}, and at the end", sizes)}
        if anchored and found:
            kinds |= {"scores": (FITTED, sizes | tried)}
        terms = loss_terms(anchored, PROTOTYPES in state.params)
        like = {
            "params": state.params, "delta": self._trained(state.params),
            "loss": dict.fromkeys(terms, torch.zeros(())),
        }  # fmt: skip
        return payload_rows(kinds, {name for name, there in holds.items() if there}, like)


def contract_of(config: Config, prior: Prior) -> Contract:
    """What clients send in every round under these settings."""
    anchored = config.prototypes.kind == "anchored"
    orthogonal = config.prototypes.kind in ("learned", "fixed")
    return Contract(
        losses=not config.privacy.enabled,
        posterior=prior.sends_posterior or (orthogonal and not prior.summed),
        size=config.federation.aggregation == "samples" or prior.sends_size,
        moments=prior.summed and not anchored,
    )


def build(*, config: Config, clients: int, noise: NoiseOf | None = None) -> FederatedVariational:
    """The server's side of the settings' method, for so many clients.

    Args:
        config: the settings.
        clients: how many clients the federation has.
        noise: source of the noise of private releases; None: one that a simulation repeats.

    Raises:
        BadInputError: privacy's noise would hide the components.
    """
    prior = build_prior(config, clients)
    fit = build_fit(config, clients, prior.summed)
    source = seeded_noise(config.seed) if noise is None else noise
    return FederatedVariational(
        build_selector(config),
        prior,
        build_prototypes(config, fit, prior.summed),
        fit,
        build_aggregator(config),
        build_release(privacy_of(config, clients), source),
        build_server(config),
        contract_of(config, prior),
        config.seed,
        config.federation.aggregation,
        config.inference.kind,
        modes_of(config),
    )
