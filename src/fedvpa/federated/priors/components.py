"""A prior of components that are fitted from sums over clients, so that the server sees nobody's
latent: the first fit by distributed k-means, then one step of EM per round."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedvpa.config import Config
from fedvpa.federated.algorithm import Clients
from fedvpa.federated.components import Moments, adjusted_price, mixture
from fedvpa.federated.messages import PROTOTYPES
from fedvpa.federated.population import MAX_MODES, SummedFit, modes_of
from fedvpa.federated.priors.gaussian import GaussianPrior
from fedvpa.federated.priors.mixture import MixedPrior, build_kl
from fedvpa.federated.release import Release
from fedvpa.types import MixturePrior, Params, ServerState


@dataclass(frozen=True)
class ComponentsPrior(MixedPrior):
    """Components as the prior's mixture. With `anchored` prototypes the same components are fitted
    once as anchors, and there is no mixture: the pull takes the place of the KL."""

    fit: SummedFit | None = None
    anchored: bool = False
    columns: int = 0
    most: int = 0
    summed: bool = True

    def broadcast(self, state: ServerState) -> MixturePrior | None:
        """The components, once they have been fitted."""
        if state.round < self.start or not state.components:
            return None
        return mixture(moments_of(state))

    def refitted(
        self, state: ServerState, moments: Moments | None, labelled: Float[Tensor, "m"] | None,
        release: Release,
    ) -> ServerState:  # fmt: skip
        """One step of EM on the cohort's moments; a component that nobody of the cohort fell to
        stays. Prices follow."""
        if moments is None:
            return state
        kept = moments.weight > release.round_floor
        merged = Moments(
            *(
                torch.where(kept.view(-1, *[1] * (old.dim() - 1)), new, old)
                for new, old in zip(moments, moments_of(state))
            )
        )
        price = state.components["price"]
        if labelled is not None:
            price = adjusted_price(price, labelled, merged)
        return replace(state, components=dict(merged._asdict()) | {"price": price})

    def begun(self, state: ServerState, clients: Clients, release: Release) -> ServerState:
        """The first fit, when the prior's time has come and anybody has been seen. Nothing has a
        price yet; with orthogonal prototypes the components get the order of those that they stand
        for."""
        seen = bool((state.clients["seen"] >= 0).any())
        due = state.round >= max(1, self.start) and not state.components and seen
        if self.anchored or not due:
            return state
        assert self.fit is not None
        found = self.fit.moments(release.asking(state, clients), release)
        if PROTOTYPES in state.params:
            found = _in_order_of(state.params[PROTOTYPES], found)
        components: Params = dict(found._asdict()) | {"price": torch.zeros_like(found.weight)}
        return replace(state, components=components)


def moments_of(state: ServerState) -> Moments:
    """The components of a state."""
    return Moments(*(state.components[name] for name in Moments._fields))


def _in_order_of(prototype: Float[Tensor, "m d"], found: Moments) -> Moments:
    """Components matched to prototypes at the least summed angle (Hungarian method)."""
    centre = found.total / found.weight.clamp_min(1e-9).unsqueeze(-1)
    unit = torch.nn.functional.normalize
    rows, columns = linear_sum_assignment(
        -(unit(centre, dim=-1) @ unit(prototype, dim=-1).T).numpy()
    )
    order = torch.empty(len(rows), dtype=torch.long)
    order[torch.as_tensor(columns)] = torch.as_tensor(rows)
    return Moments(*(value[order] for value in found))


def build(*, config: Config, clients: int) -> ComponentsPrior:
    """The prior of the settings."""
    anchored, modes = config.prototypes.kind == "anchored", modes_of(config)
    most = 0 if anchored else modes or MAX_MODES
    return ComponentsPrior(
        build_kl(config),
        GaussianPrior(config.objective.free_bits),
        config.prior.start_round,
        SummedFit(modes, config.seed, config.model.latent, clients),
        anchored,
        most if config.prior.weights == "gumbel" else 0,
        most,
    )
