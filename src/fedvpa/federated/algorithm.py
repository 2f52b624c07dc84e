"""The shape of a federated algorithm, after fedjax: pure functions of a state and of clients.

`init(roster)` gives the first state and `apply(state, clients, cohort)` one round. An algorithm
knows how many clients there are and nothing else of them: clients are an argument, simulated in
this process or reached across a network.

A predictor is what is left after training: it turns a user's context into a state (a latent,
fine-tuned weights, or nothing) and a state into reward margins. Swapping users' states is how one
asks whether a method uses them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedvpa.federated.batch import Roster
from fedvpa.federated.components import Moments
from fedvpa.federated.exchanges import Payload
from fedvpa.federated.messages import Broadcast, Scores, Update
from fedvpa.federated.random import stream
from fedvpa.types import PairBatch, Params, Population, Posterior, ServerState


@runtime_checkable
class Clients(Protocol):
    """The clients of a variational method, wherever they are.

    A client is known by its place in the roster. `tables` holds one row per client of what is
    private to it, where that is kept here.
    """

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
        """Let every client note which component it belongs to; its row of the tables, where these
        are kept here."""
        ...


@runtime_checkable
class Predictor(Protocol):
    """Predicts users' choices."""

    def adapt(self, context: PairBatch, group: Int[Tensor, "u"]) -> Float[Tensor, "u s"]:
        """State of every user given its context; only `oracle-group` reads the true group."""
        ...

    def margin(self, state: Float[Tensor, "u s"], target: PairBatch) -> Float[Tensor, "u n"]:
        """Reward margins of the target pairs."""
        ...

    def neutral(self, users: int) -> Float[Tensor, "u s"]:
        """State of a user without context (the prior mean)."""
        ...


@runtime_checkable
class SharedBeside(Protocol):
    """A predictor beside which a shared reward was trained, on the same pairs and rounds."""

    def shared_margin(self, target: PairBatch) -> Float[Tensor, "u n"]:
        """Margins of the shared reward."""
        ...


@runtime_checkable
class LatentPredictor(Predictor, Protocol):
    """A predictor whose state is a latent with a posterior.

    `population` holds the components of the prior or of the clients, where there are any, and
    `named` the z of preferences worth a name: centres of groups, or both ends of the main
    directions.
    """

    @property
    def population(self) -> Population | None: ...

    @property
    def params(self) -> Params: ...

    @property
    def named(self) -> Float[Tensor, "m d"] | None: ...

    def posterior(self, context: PairBatch) -> Posterior:
        """Posterior over z given each user's context."""
        ...

    def amortised(self, context: PairBatch) -> Posterior:
        """The encoder's posterior, without the population's help."""
        ...

    def responsibilities(self, context: PairBatch) -> Float[Tensor, "u m"]:
        """Posterior over the components."""
        ...

    def margin_under(self, z: Float[Tensor, "u d"], target: PairBatch) -> Float[Tensor, "u n"]:
        """Margins of the reward under z."""
        ...

    def prior_mean(self) -> Float[Tensor, "d"]:
        """z of somebody of whom nothing is known."""
        ...


@runtime_checkable
class Algorithm(Protocol):
    """A federated algorithm; `clients` are of the kind that its method builds."""

    def init(self, roster: Roster) -> ServerState:
        """State before the first round."""
        ...

    def apply(
        self, state: ServerState, clients: Any, cohort: Sequence[int]
    ) -> tuple[ServerState, dict[str, float]]:
        """One round with the clients of the cohort; the given state is left as it was."""
        ...

    def finalise(self, state: ServerState, clients: Any) -> ServerState:
        """What remains to be done after the last round."""
        ...

    def predictor(self, state: ServerState) -> Predictor:
        """The trained method."""
        ...

    def payload(self, state: ServerState) -> list[Payload]:
        """All that travels between a client and the server."""
        ...


def sample_cohort(seed: int, round_number: int, clients: int, size: int) -> list[int]:
    """Clients of a round, drawn without replacement (all if `size` is 0), in ascending order."""
    if size == 0 or size >= clients:
        return list(range(clients))
    generator = stream(seed, "cohort", round_number)
    return sorted(torch.randperm(clients, generator=generator)[:size].tolist())


def poisson_cohort(generator: torch.Generator, clients: int, rate: float) -> list[int]:
    """Clients of a round, each with probability `rate`, independently, as the accounting of
    differential privacy presumes."""
    drawn = torch.rand(clients, generator=generator) < rate
    return drawn.nonzero().squeeze(-1).tolist()
