"""Priors of the latent preference in training (M3-M5).

| prior | density | what the server sees of a client |
|---|---|---|
| `gaussian` | N(0, I) | nothing more than the update |
| `peers` | mixture of the peers' posteriors (M3) | the client's posterior, every round |
| `components` | mixture of fitted components | sums over clients alone |
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float, Int
from torch import Tensor

from fedvpa.config import Config
from fedvpa.federated.algorithm import Clients
from fedvpa.federated.components import Moments
from fedvpa.federated.release import Release
from fedvpa.parts import PRIORS, builder, part
from fedvpa.types import MixturePrior, Posterior, ServerState


class Prior(ABC):
    """A prior of z: on the client's side a KL, on the server's side what is broadcast for it.

    A prior of a fixed density overrides `kl` alone. A builder is called with ``config=`` and
    ``clients=``, the number of clients in the federation.
    """

    summed: bool = False
    """Whether the population may be learned from sums over clients alone."""
    sends_posterior: bool = False
    """Whether the server reads every client's posterior in every round."""
    sends_size: bool = False
    """Whether the server reads the number of a client's pairs."""
    columns: int = 0
    """How many private logits a client keeps (0: none)."""
    most: int = 0
    """How many components the broadcast mixture has at most (0: there is no mixture)."""

    @abstractmethod
    def kl(
        self,
        posterior: Posterior,
        prior: MixturePrior | None,
        logit: Float[Tensor, "*#c l"] | None,
        client: Int[Tensor, "*#c"],
        noise: Float[Tensor, "s *#c d"],
        uniform: Float[Tensor, "*#c k"],
    ) -> Float[Tensor, "*c"]:
        """KL(q(z | context) || p(z)) of every client, in nats.

        Args:
            posterior: q(z | context), mean and log-variance [*c, d].
            prior: the mixture that was broadcast; None while there is none.
            logit: the clients' own logits of the mixture's weights, of `columns` numbers.
            client: the clients' indices, by which each finds itself among its peers.
            noise: the standard normal numbers that made the samples of z.
            uniform: uniform numbers, one per component of the mixture.
        """

    def broadcast(self, state: ServerState) -> MixturePrior | None:
        """The mixture that the clients of the coming round are sent; None stands for none."""
        return None

    def refitted(
        self, state: ServerState, moments: Moments | None, labelled: Float[Tensor, "m"] | None,
        release: Release,
    ) -> ServerState:  # fmt: skip
        """The state after a round whose clients answered with these sums under the mixture."""
        return state

    def begun(self, state: ServerState, clients: Clients, release: Release) -> ServerState:
        """The state once the prior's time has come; clients may be asked."""
        return state


def build_prior(config: Config, clients: int) -> Prior:
    """The prior that the settings name (`prior.kind`), for so many clients."""
    prior: Prior = builder(part("prior", PRIORS, config.prior.kind))(config=config, clients=clients)
    return prior
