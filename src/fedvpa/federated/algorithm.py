"""The shape of a federated algorithm: `init` and `apply(state, cohort) -> state, diagnostics`
(after fedjax).

A predictor is what is left after training: it turns a user's context into a state (a latent,
fine-tuned weights, or nothing) and a state into reward margins. Swapping users' states is how one
asks whether a method uses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedvpa.federated.draws import stream
from fedvpa.types import PairBatch, Params, Posterior, ServerState


class Payload(NamedTuple):
    """One tensor that travels: its name, shape, bytes, and which way (`down` to the client, `up` to
    the server)."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    direction: str
    when: str = "every round"


@runtime_checkable
class Predictor(Protocol):
    """Predicts users' choices."""

    def adapt(self, context: PairBatch, group: Int[Tensor, "u"]) -> Float[Tensor, "u s"]:
        """State of every user given its context; only the `oracle-group` bound reads the true
        group."""
        ...

    def margin(self, state: Float[Tensor, "u s"], target: PairBatch) -> Float[Tensor, "u n"]:
        """Reward margins of the target pairs."""
        ...

    def neutral(self, users: int) -> Float[Tensor, "u s"]:
        """State of a user of whom nothing is known (the prior mean)."""
        ...


@runtime_checkable
class LatentPredictor(Predictor, Protocol):
    """A predictor whose state is a latent with a posterior."""

    def posterior(self, context: PairBatch) -> Posterior:
        """Posterior over z given each user's context."""
        ...

    def amortised(self, context: PairBatch) -> Posterior:
        """The encoder's posterior, without the population's help."""
        ...


@runtime_checkable
class Algorithm(Protocol):
    """A federated algorithm over the clients it was built with."""

    def init(self) -> ServerState:
        """State before the first round."""
        ...

    def apply(
        self, state: ServerState, cohort: Sequence[int]
    ) -> tuple[ServerState, dict[str, float]]:
        """One round with these clients; the given state is left as it was."""
        ...

    def finalise(self, state: ServerState) -> ServerState:
        """What remains to be done after the last round."""
        ...

    def predictor(self, state: ServerState) -> Predictor:
        """The trained method."""
        ...

    def payload(self, state: ServerState) -> list[Payload]:
        """All that travels between a client and the server."""
        ...


def sample_cohort(seed: int, round_number: int, clients: int, size: int) -> list[int]:
    """Clients of a round, drawn without replacement (all of them if `size` is 0), in ascending
    order."""
    if size == 0 or size >= clients:
        return list(range(clients))
    generator = stream(seed, "cohort", round_number)
    return sorted(torch.randperm(clients, generator=generator)[:size].tolist())


def poisson_cohort(generator: torch.Generator, clients: int, rate: float) -> list[int]:
    """Clients of a round, each of them with probability `rate`, independently: what privacy's
    accounting asks for."""
    return (torch.rand(clients, generator=generator) < rate).nonzero().squeeze(-1).tolist()


def tensor_payload(params: Params, direction: str, prefix: str = "") -> list[Payload]:
    """A row for each tensor."""
    return [
        Payload(prefix + name, tuple(value.shape), value.numel() * value.element_size(), direction)
        for name, value in params.items()
    ]
