r"""Amortised posterior q(z | context) from a set of annotated pairs (M1; VPL, Poddar et al., 2024,
sec. 3).

Each pair's preference direction passes a tanh network; the pairs of the context are pooled:

* `mean` - heads for the mean and log-variance on the average of the pairs' hidden features, as if
  `shrinkage` more pairs of zeros had been seen: with few pairs the mean stays near that of N(0, I),
  as a conjugate posterior's would;
* `attention` - the same on a weighted average, with one learned query;
* `poe` - every pair gives a Gaussian expert; precisions add to those of N(0, I), so sigma shrinks
  with every pair.

An *odd* encoder has no biases on the way to the mean, so that tanh networks give f(-x) = -f(x): a
context with all its labels reversed has exactly the reversed mean and, its variance being read from
the absolute values, the same sigma. That is the swap guidance of SPL (cf. P-IAF: swap-odd signals
drive shift, swap-even ones scale) by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedvpa.functional.gaussian import bounded_log_var, product_of_experts
from fedvpa.selector.layers import linear, linear_params, mlp, mlp_params
from fedvpa.types import Params, Posterior


@dataclass(frozen=True)
class Encoder:
    """Sizes and options of the encoder; parameters are passed in."""

    inputs: int
    latent: int
    hidden: tuple[int, ...] = (64,)
    pooling: Literal["mean", "attention", "poe"] = "mean"
    odd: bool = True
    shrinkage: float = 0.0

    def init(self, generator: torch.Generator) -> Params:
        """Fresh parameters."""
        params = mlp_params("encoder", (self.inputs, *self.hidden), generator)
        width = self.hidden[-1] if self.hidden else self.inputs
        params |= linear_params("encoder.mean", width, self.latent, generator)
        params |= linear_params("encoder.log_var", width, self.latent, generator, scale=0.1)
        if self.pooling == "attention":
            params["encoder.query"] = torch.zeros(width)
        if self.odd:
            params = {
                k: v
                for k, v in params.items()
                if not k.endswith(".bias") or k == "encoder.log_var.bias"
            }
        return params

    def __call__(
        self, params: Params, difference: Float[Tensor, "*b n p"], context: Bool[Tensor, "*b n"]
    ) -> Posterior:
        """Posterior [*b, d] given the pairs that `context` marks; with none it is the encoder's own
        prior guess.

        The parameters' leading axes are those of the data, or absent.
        """
        hidden = mlp(params, "encoder", difference, len(self.hidden))
        even = hidden.abs() if self.odd else hidden  # what a swap of labels leaves alone
        weight = context.to(hidden.dtype)
        if self.pooling == "poe":
            raw = self._log_var(params, even)
            return Posterior(
                *product_of_experts(linear(params, "encoder.mean", hidden), raw, weight)
            )
        if self.pooling == "attention":
            score = (
                (even @ params["encoder.query"].unsqueeze(-1))
                .squeeze(-1)
                .masked_fill(~context, -1e30)
            )
            weight = torch.softmax(score, -1) * weight  # an empty context leaves no weight
        else:
            weight = weight / (weight.sum(-1, keepdim=True) + self.shrinkage).clamp_min(1)
        row = weight.unsqueeze(-2)
        mean = linear(params, "encoder.mean", row @ hidden).squeeze(-2)
        log_var = self._log_var(params, row @ even).squeeze(-2)
        return Posterior(mean, log_var)

    def _log_var(self, params: Params, even: Float[Tensor, "*b n w"]) -> Float[Tensor, "*b n d"]:
        return bounded_log_var(linear(params, "encoder.log_var", even))
