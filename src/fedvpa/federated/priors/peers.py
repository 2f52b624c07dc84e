"""The federated mixture prior of FedVPA-GP: the peers' posteriors (M3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from fedvpa.config import Config
from fedvpa.federated.priors.gaussian import GaussianPrior
from fedvpa.federated.priors.mixture import MixedPrior, build_kl
from fedvpa.federated.random import stream
from fedvpa.types import MixturePrior, ServerState


@dataclass(frozen=True)
class PeersPrior(MixedPrior):
    """A mixture of the posteriors that clients sent; the server sees each of them.

    Args:
        members: `known`: everybody who ever sent a posterior; `last-round`: the last cohort.
        peers: clients that may be components, in ascending order.
    """

    members: Literal["known", "last-round"] = "known"
    peers: Int[Tensor, "j"] = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    sends_posterior: bool = True

    @property
    def sends_size(self) -> bool:  # type: ignore[override]
        """With weights by the number of pairs."""
        return self.mixture_kl.weights == "sample-size"

    @property
    def columns(self) -> int:  # type: ignore[override]
        """A logit per peer, with learned weights."""
        return self.peers.numel() if self.mixture_kl.weights == "gumbel" else 0

    @property
    def most(self) -> int:  # type: ignore[override]
        """All peers."""
        return self.peers.numel()

    def broadcast(self, state: ServerState) -> MixturePrior | None:
        """The posteriors of those who have been seen."""
        if state.round < self.start:
            return None
        table = state.clients
        oldest = state.round - 1 if self.members == "last-round" else 0
        slot = (table["seen"][self.peers] >= max(0, oldest)).nonzero().squeeze(-1)
        if slot.numel() < (2 if self.mixture_kl.exclude_self else 1):
            return None
        client = self.peers[slot]
        size = table["size"][client] if "size" in table else torch.ones(client.numel())
        return MixturePrior(table["mean"][client], table["log_var"][client], size, client, slot)


def build(*, config: Config, clients: int) -> PeersPrior:
    """The prior of the settings: over all clients, or over a random `max_components` of them."""
    p = config.prior
    peers = torch.arange(clients)
    if clients > p.max_components:
        order = torch.randperm(clients, generator=stream(config.seed, "peers"))
        peers = order[: p.max_components].sort().values
    alone = GaussianPrior(config.objective.free_bits)
    return PeersPrior(build_kl(config), alone, p.start_round, p.members, peers)
