"""A trained variational selector, as it serves users: contexts in, latents and margins out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedvpa.functional.preference import predictive_margin
from fedvpa.selector.selector import Selector, refined_posterior
from fedvpa.types import PairBatch, Params, Population, Posterior


@dataclass(frozen=True)
class VariationalPredictor:
    """A trained selector; a user's state is z, or its posterior over the population's
    components."""

    selector: Selector
    params: Params
    population: Population | None
    inference: Literal["amortised", "population"] = "amortised"

    @torch.no_grad()
    def amortised(self, context: PairBatch) -> Posterior:
        """The encoder's posterior; of an empty context it is N(0, I)."""
        posterior = self.selector.posterior(self.params, context, context.mask)
        empty = ~context.mask.any(-1, keepdim=True)
        return Posterior(*(value.masked_fill(empty, 0.0) for value in posterior))

    @torch.no_grad()
    def responsibilities(self, context: PairBatch) -> Float[Tensor, "u m"]:
        """Posterior over the fitted components given each user's context.

        Raises:
            ValueError: no population has been fitted yet.
        """
        if self.population is None:
            raise ValueError("no population has been fitted yet")
        return self.selector.responsibilities(self.params, self.population, context, context.mask)

    @property
    def named(self) -> Float[Tensor, "m d"] | None:
        """Fitted components of the population, or orthogonal prototypes."""
        return self.params.get("prototypes") if self.population is None else self.population.mean

    def posterior(self, context: PairBatch) -> Posterior:
        """Amortised, or refined by the population."""
        if self._mixes and self.population is not None:
            return refined_posterior(self.responsibilities(context), self.population)
        return self.amortised(context)

    def adapt(self, context: PairBatch, group: Int[Tensor, "u"]) -> Float[Tensor, "u s"]:
        """State of each user: shares of the components with population inference, else z; the true
        group is not read."""
        return self.responsibilities(context) if self._mixes else self.amortised(context).mean

    @torch.no_grad()
    def margin(self, state: Float[Tensor, "u s"], target: PairBatch) -> Float[Tensor, "u n"]:
        """Log-odds of the choices: the posterior predictive over the components, or the reward's
        margin under z."""
        if self._mixes and self.population is not None:
            each = self.selector.component_margins(self.params, self.population, target)
            return predictive_margin(state, each)
        return self.margin_under(state, target)

    @torch.no_grad()
    def margin_under(self, z: Float[Tensor, "u d"], target: PairBatch) -> Float[Tensor, "u n"]:
        """Margins of the reward under z."""
        return self.selector.margin(self.params, z, target)

    def neutral(self, users: int) -> Float[Tensor, "u s"]:
        """State of somebody of whom nothing is known."""
        if self._mixes and self.population is not None:
            return self.population.weight.expand(users, -1)
        return torch.zeros(users, self.selector.encoder.latent)

    def prior_mean(self) -> Float[Tensor, "d"]:
        """z of somebody of whom nothing is known: the population's mean where it is used, else
        zero."""
        if self._mixes and self.population is not None:
            return self.population.weight @ self.population.mean
        return torch.zeros(self.selector.encoder.latent)

    @property
    def _mixes(self) -> bool:
        return self.inference == "population" and self.population is not None
