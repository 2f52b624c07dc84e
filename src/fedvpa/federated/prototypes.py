"""Prototypes of the preference modes on the server's side (M6).

| prototypes | what pulls the encoder |
|---|---|
| `none` | nothing |
| `anchored` | components of the population that are fitted once, then frozen |
| `learned`, `fixed` | orthogonal directions at a radius, one per label |
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.config import Config
from fedvpa.federated.algorithm import Clients
from fedvpa.federated.messages import PROTOTYPES
from fedvpa.federated.population import PopulationFit, balanced_labels
from fedvpa.federated.release import Release
from fedvpa.functional.prototypes import orthogonal_prototypes
from fedvpa.types import Params, Population, ServerState


@dataclass(frozen=True)
class Prototypes:
    """None at all; the kinds that exist override what they need. `start`: the round from which
    they act."""

    start: int = 0
    anchored: bool = False
    fixed: tuple[str, ...] = ()
    """Names of parameters that are broadcast and not trained."""
    labelled: bool = False
    """Whether the server labels clients by their posteriors."""

    def init(self, generator: torch.Generator) -> Params:
        """Parameters of their own."""
        return {}

    def anchors(self, state: ServerState) -> Population | None:
        """Components that pull in the coming round."""
        return None

    def price(self, state: ServerState) -> Float[Tensor, "m"] | None:
        """Prices by which clients choose their component in the coming round."""
        return None

    def after_round(self, state: ServerState, clients: Clients, release: Release) -> ServerState:
        """Anchors or labels, once their time has come."""
        return state


@dataclass(frozen=True)
class Anchors(Prototypes):
    """Components of the clients' posteriors under the model of round `start`."""

    fit: PopulationFit | None = None
    anchored: bool = True

    def anchors(self, state: ServerState) -> Population | None:
        """The fitted components."""
        acts = state.round >= self.start and bool(state.population)
        return Population(**state.population) if acts else None

    def after_round(self, state: ServerState, clients: Clients, release: Release) -> ServerState:
        """One exchange of fresh posteriors: those of earlier rounds come from other encoders."""
        seen = bool((state.clients["seen"] >= 0).any())
        if state.population or state.round < self.start or not seen:
            return state
        assert self.fit is not None
        return replace(state, population=self.fit.anchors(state, clients, release)._asdict())


@dataclass(frozen=True)
class Orthogonal(Prototypes):
    """Orthogonal prototypes; the server labels clients by balanced k-means on their posteriors, or,
    where it sees sums alone, prices the components and lets clients choose."""

    modes: int = 2
    latent: int = 16
    radius: float = 5.0
    seed: int = 0

    def init(self, generator: torch.Generator) -> Params:
        """Orthogonal directions at the radius."""
        prototypes = orthogonal_prototypes(self.modes, self.latent, self.radius, generator)
        return {PROTOTYPES: prototypes}

    def price(self, state: ServerState) -> Float[Tensor, "m"] | None:
        """The prior's components carry them, if they are fitted from sums."""
        if self.labelled or state.round < self.start:
            return None
        return state.components.get("price")

    def after_round(self, state: ServerState, clients: Clients, release: Release) -> ServerState:
        """New labels for everybody who has been seen."""
        if not self.labelled or state.round < self.start:
            return state
        seen = (state.clients["seen"] >= 0).nonzero().squeeze(-1)
        label = torch.full_like(state.clients["label"], -1)
        mean = state.clients["mean"][seen]
        label[seen] = balanced_labels(mean, state.params[PROTOTYPES], self.seed)
        return replace(state, clients=state.clients | {"label": label})


def build_prototypes(config: Config, fit: PopulationFit, summed: bool) -> Prototypes:
    """The prototypes of the settings; `summed`: the server sees sums over clients alone."""
    p, start = config.prototypes, config.prototypes_start
    if p.kind == "none":
        return Prototypes(start)
    if p.kind == "anchored":
        return Anchors(start, fit=fit)
    assert isinstance(p.modes, int)  # the settings were checked
    fixed = (PROTOTYPES,) if p.kind == "fixed" else ()
    return Orthogonal(
        start, False, fixed, not summed, p.modes, config.model.latent, p.radius, config.seed
    )
