"""The variational preference selector: encoder and conditioned reward (M1, M2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedvpa.config import Config
from fedvpa.functional.segments import spread, spread_rows, summed
from fedvpa.selector.encoder import Encoder
from fedvpa.selector.heads import Head, build_head
from fedvpa.types import PairBatch, Params, Population, Posterior


@dataclass(frozen=True)
class Selector:
    """Composes an encoder and a reward that share their latent; parameters are passed in."""

    encoder: Encoder
    reward: Head
    latent_evidence: float = 0.1

    def init(self, generator: torch.Generator) -> Params:
        """Fresh parameters of both."""
        return self.encoder.init(generator) | self.reward.init(generator)

    def posterior(
        self, params: Params, batch: PairBatch, context: Bool[Tensor, "*b n"]
    ) -> Posterior:
        """q(z | context)."""
        return self.encoder(params, batch.difference, context, batch.owner)

    def margin(
        self, params: Params, z: Float[Tensor, "*#b d"], batch: PairBatch
    ) -> Float[Tensor, "... n"]:
        """r(chosen, z) - r(rejected, z); parameters and z are each client's own, and where the
        batch holds blocks, those of the blocks' owners."""
        owner = batch.owner
        if owner is not None:
            params = spread({n: v for n, v in params.items() if n.startswith("reward.")}, owner)
        return self.reward.margin(params, spread_rows(z, owner), batch)

    def component_margins(
        self, params: Params, population: Population, batch: PairBatch
    ) -> Float[Tensor, "*b n m"]:
        """Margin of every pair under the centre of every component; of blocks, too, since
        everybody's parameters are the same."""
        users = batch.mask.shape[:-1]
        return torch.stack(
            [
                self.reward.margin(params, centre.expand(*users, -1), batch)
                for centre in population.mean
            ],
            -1,
        )

    def evidence(
        self, params: Params, population: Population, batch: PairBatch
    ) -> Float[Tensor, "*b n m"]:
        """Log-likelihood of every choice under the centre of every component, in nats."""
        return logsigmoid(self.component_margins(params, population, batch))

    def responsibilities(
        self,
        params: Params,
        population: Population,
        batch: PairBatch,
        context: Bool[Tensor, "*b n"],
    ) -> Float[Tensor, "*b m"]:
        """Posterior over the population's components given a context (see `combine`)."""
        mean = self.posterior(params, batch, context).mean
        evidence = self.evidence(params, population, batch)
        return self.combine(population, evidence, mean, context, batch.owner)

    def combine(
        self,
        population: Population,
        evidence: Float[Tensor, "*b n m"],
        mean: Float[Tensor, "*c d"],
        context: Bool[Tensor, "*b n"],
        owner: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "*c m"]:
        r"""Bayes' rule over the components: r_m ~ w_m N(mu; c_m, v I)^rho prod_context p(choice | z
        = c_m).

        The amortised mean mu is read from the same choices as the likelihood, so its density is
        tempered by rho (`latent_evidence`); v is the components' mean variance. With an empty
        context r = w.
        """
        known = context.to(evidence.dtype)
        likelihood = summed((evidence * known.unsqueeze(-1)).sum(-2), owner)
        squared = (mean.unsqueeze(-2) - population.mean).square().sum(-1)
        some = summed(known.sum(-1, keepdim=True), owner) > 0
        density = -0.5 * squared / population.variance.mean() * some
        return torch.softmax(
            population.weight.log() + self.latent_evidence * density + likelihood, -1
        )


def refined_posterior(responsibility: Float[Tensor, "*b m"], population: Population) -> Posterior:
    """Mean and variance of the mixture of components with these responsibilities (moment
    matching)."""
    mean = responsibility @ population.mean
    second = responsibility @ (population.mean.square() + population.variance.unsqueeze(-1))
    return Posterior(mean, (second - mean.square()).clamp_min(1e-8).log())


def build_selector(config: Config) -> Selector:
    """The selector of the settings: its encoder (M1) and its reward head (M2)."""
    m = config.model
    encoder = Encoder(m.inputs, m.latent, m.encoder_hidden, m.pooling, m.odd_mean, m.shrinkage)
    return Selector(encoder, build_head(config=config), config.inference.latent_evidence)
