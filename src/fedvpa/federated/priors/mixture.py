"""What the mixture priors share: weights of the components (M4) and the KL to the mixture (M5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedvpa.config import Config
from fedvpa.federated.priors import Prior
from fedvpa.federated.priors.gaussian import GaussianPrior
from fedvpa.functional.mixture import (
    gumbel_noise,
    gumbel_softmax_log_weight,
    mixture_kl_bound,
    mixture_prior_kl,
)
from fedvpa.types import MixturePrior, Posterior


@dataclass(frozen=True)
class MixtureKl:
    """KL to a mixture whose weights are learned (`gumbel`), equal, or shares of pairs."""

    weights: Literal["gumbel", "uniform", "sample-size"] = "gumbel"
    temperature: float = 1.0
    estimator: Literal["monte-carlo", "hershey-olsen"] = "monte-carlo"
    exclude_self: bool = True
    free_bits: float = 0.0

    def __call__(
        self,
        posterior: Posterior,
        prior: MixturePrior,
        logit: Float[Tensor, "*#c l"] | None,
        client: Int[Tensor, "*#c"],
        noise: Float[Tensor, "s *#c d"],
        uniform: Float[Tensor, "*#c k"],
    ) -> Float[Tensor, "*c"]:
        """By samples, or by the bound of Hershey & Olsen (2007); free bits count over all
        dimensions together."""
        log_weight = self.log_weight(logit, prior, client, uniform)
        if self.estimator == "hershey-olsen":
            kl = mixture_kl_bound(*posterior, prior.mean, prior.log_var, log_weight)
        else:
            kl = mixture_prior_kl(*posterior, prior.mean, prior.log_var, log_weight, noise)
        return kl.clamp_min(self.free_bits * posterior.mean.shape[-1]) if self.free_bits else kl

    def log_weight(
        self,
        logit: Float[Tensor, "*#c l"] | None,
        prior: MixturePrior,
        client: Int[Tensor, "*#c"],
        uniform: Float[Tensor, "*#c k"] | None,
    ) -> Float[Tensor, "*#c k"]:
        """Log-weights of the mixture (M4). Without `uniform` noise: the plain softmax of the
        learned logits."""
        base = (
            torch.zeros(prior.client.shape)
            if self.weights != "sample-size"
            else prior.size.clamp_min(1e-6).log()
        )
        if self.exclude_self and prior.client.numel() > 1:
            base = base.masked_fill(prior.client == client.unsqueeze(-1), -torch.inf)
        if self.weights != "gumbel" or logit is None:
            return torch.log_softmax(base.expand(*client.shape, -1), -1)
        gumbel = torch.zeros(()) if uniform is None else gumbel_noise(uniform)
        return gumbel_softmax_log_weight(base + logit[..., prior.slot], gumbel, self.temperature)


@dataclass(frozen=True)
class MixedPrior(Prior):
    """A prior that is N(0, I) until its mixture is known."""

    mixture_kl: MixtureKl
    alone: GaussianPrior
    start: int = 0

    def kl(
        self,
        posterior: Posterior,
        prior: MixturePrior | None,
        logit: Float[Tensor, "*#c l"] | None,
        client: Int[Tensor, "*#c"],
        noise: Float[Tensor, "s *#c d"],
        uniform: Float[Tensor, "*#c k"],
    ) -> Float[Tensor, "*c"]:
        """To the mixture that was broadcast, or to N(0, I)."""
        if prior is None:
            return self.alone.kl(posterior, None, logit, client, noise, uniform)
        return self.mixture_kl(posterior, prior, logit, client, noise, uniform)


def build_kl(config: Config) -> MixtureKl:
    """The KL of the settings."""
    p = config.prior
    return MixtureKl(
        p.weights, p.temperature, p.estimator, p.exclude_self, config.objective.free_bits
    )
