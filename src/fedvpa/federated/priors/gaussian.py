"""The standard prior: N(0, I)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from fedvpa.config import Config
from fedvpa.federated.priors import Prior
from fedvpa.functional.gaussian import standard_kl_per_dimension
from fedvpa.types import MixturePrior, Posterior


@dataclass(frozen=True)
class GaussianPrior(Prior):
    """N(0, I); `free_bits` nats per dimension cost nothing (Kingma et al., 2016, eq. 15)."""

    free_bits: float = 0.0

    def kl(
        self,
        posterior: Posterior,
        prior: MixturePrior | None,
        logit: Float[Tensor, "*#c l"] | None,
        client: Int[Tensor, "*#c"],
        noise: Float[Tensor, "s *#c d"],
        uniform: Float[Tensor, "*#c k"],
    ) -> Float[Tensor, "*c"]:
        """In closed form."""
        each = standard_kl_per_dimension(*posterior)
        return (each.clamp_min(self.free_bits) if self.free_bits else each).sum(-1)


def build(*, config: Config, clients: int) -> GaussianPrior:
    """The prior of the settings."""
    return GaussianPrior(config.objective.free_bits)
