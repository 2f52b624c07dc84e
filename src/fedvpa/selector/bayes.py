"""Bayes under the federated mixture prior (M9): a bilinear reward, the posterior of z by Newton.

The margin of a pair is dh . (w + W^T z). A user's posterior is a mixture, one Gaussian for each
component of the population: p(z) times the likelihood of the context's choices (Laplace). Without a
context it is the prior; with many pairs it leaves the components. Nothing is amortised: the first
Newton step is a linear encoder of the context, and further ones cost next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedvpa.functional.laplace import STEPS, Laplace, laplace, mixed_log_odds, predicted
from fedvpa.types import PairBatch, Params, Population, Posterior

WEIGHT, BILINEAR, SHARED = "reward.weight", "reward.bilinear", "shared.weight"
END = 1.5
"""Standard deviations of z at which an end of a direction is."""
MAIN = 0.1
"""A direction is a main one if it explains so much of the variance of people's rewards."""


@dataclass(frozen=True)
class BayesSelector:
    """Sizes of the selector; parameters are passed in."""

    inputs: int
    latent: int
    steps: int = STEPS

    def infer(
        self, params: Params, population: Population, pairs: PairBatch,
        weight: Float[Tensor, "*b n"],
    ) -> Laplace:  # fmt: skip
        """The posterior given the pairs that have weight, [*b, m, ...]."""
        offset, design = self.design(params, pairs)
        return laplace(offset, design, weight, population.mean, population.variance, self.steps)

    def design(
        self, params: Params, pairs: PairBatch
    ) -> tuple[Float[Tensor, "*b n"], Float[Tensor, "*b n d"]]:
        """Log-odds of the pairs under z = 0, and their derivative with respect to z."""
        offset = (pairs.difference @ params[WEIGHT].unsqueeze(-1)).squeeze(-1)
        return offset, pairs.difference @ params[BILINEAR].mT

    def margin(
        self, params: Params, z: Float[Tensor, "*b d"], pairs: PairBatch
    ) -> Float[Tensor, "*b n"]:
        """Margins under z."""
        offset, design = self.design(params, pairs)
        return offset + (design @ z.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class BayesPredictor:
    """A trained selector as it serves users. A user's state is its posterior: shares of the
    components, and each one's mode and covariance, in one row."""

    selector: BayesSelector
    params: Params
    population: Population

    @torch.no_grad()
    def inferred(self, context: PairBatch) -> tuple[Float[Tensor, "u m"], Laplace]:
        """Log-shares of the components, and the posterior within each."""
        found = self.selector.infer(
            self.params, self.population, context, context.mask.to(context.difference.dtype)
        )
        prior = self.population.weight.log()
        return torch.log_softmax(prior + found.evidence, -1), found

    @property
    def named(self) -> Float[Tensor, "m d"] | None:
        """Centres of the groups, or both ends of the main directions in which people differ (None:
        they do not)."""
        if self.population.weight.numel() > 1:
            return self.population.mean
        axes, scale, _ = torch.linalg.svd(self.params[BILINEAR], full_matrices=False)
        explained = scale.square() / scale.square().sum().clamp_min(1e-12)
        main = axes.T[explained >= MAIN]
        largest = main.abs().argmax(-1, keepdim=True) if len(main) else None
        if largest is None:
            return None
        main = main * main.gather(-1, largest).sign()
        return END * torch.stack([main, -main], 1).flatten(0, 1)

    def shared_margin(self, target: PairBatch) -> Float[Tensor, "u n"]:
        """Margins of the shared reward that was trained beside."""
        return (target.difference @ self.params[SHARED].unsqueeze(-1)).squeeze(-1)

    def amortised(self, context: PairBatch) -> Posterior:
        """The posterior: nothing is amortised."""
        return self.posterior(context)

    def responsibilities(self, context: PairBatch) -> Float[Tensor, "u m"]:
        """Posterior over the components given each user's context."""
        return self.inferred(context)[0].exp()

    def posterior(self, context: PairBatch) -> Posterior:
        """Mean and variance of z (of the mixture, moment matching)."""
        log_share, found = self.inferred(context)
        share = log_share.exp().unsqueeze(-1)
        mean = (share * found.mode).sum(-2)
        variance = found.covariance.diagonal(dim1=-2, dim2=-1)
        second = (share * (found.mode.square() + variance)).sum(-2)
        return Posterior(mean, (second - mean.square()).clamp_min(1e-8).log())

    def adapt(self, context: PairBatch, group: Int[Tensor, "u"]) -> Float[Tensor, "u s"]:
        """Every user's posterior in one row; the true group is not read."""
        return _packed(*self.inferred(context))

    def margin(self, state: Float[Tensor, "u s"], target: PairBatch) -> Float[Tensor, "u n"]:
        """Log-odds of the targets, averaged over the posterior."""
        log_share, found = self._unpacked(state)
        offset, design = self.selector.design(self.params, target)
        return mixed_log_odds(log_share, predicted(offset, design, found).log_odds)

    def margin_under(self, z: Float[Tensor, "u d"], target: PairBatch) -> Float[Tensor, "u n"]:
        """Margins of the reward under z."""
        return self.selector.margin(self.params, z, target)

    def neutral(self, users: int) -> Float[Tensor, "u s"]:
        """The prior, for users without context."""
        nobody = PairBatch(
            torch.zeros(1, 0, self.selector.inputs), None, torch.zeros(1, 0),
            torch.zeros(1, 0, dtype=torch.bool),
        )  # fmt: skip
        return self.adapt(nobody, torch.full((1,), -1)).expand(users, -1)

    def prior_mean(self) -> Float[Tensor, "d"]:
        """z of somebody of whom nothing is known."""
        return self.population.weight @ self.population.mean

    def _unpacked(self, state: Float[Tensor, "u s"]) -> tuple[Tensor, Laplace]:
        m, d = self.population.mean.shape
        share, mode, covariance = state.split([m, m * d, m * d * d], -1)
        users = state.shape[0]
        return share, Laplace(mode.view(users, m, d), covariance.view(users, m, d, d), share)


def _packed(log_share: Float[Tensor, "u m"], found: Laplace) -> Float[Tensor, "u s"]:
    return torch.cat([log_share, found.mode.flatten(1), found.covariance.flatten(1)], -1)
