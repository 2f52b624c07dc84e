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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedvpa.functional.gaussian import bounded_log_var, product_of_experts
from fedvpa.functional.segments import largest, spread, spread_rows, summed
from fedvpa.selector.layers import linear, linear_params, mlp, mlp_params
from fedvpa.types import Params, Posterior

PARTS = ("weight", "bias")


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
        self, params: Params, difference: Float[Tensor, "*b n p"], context: Bool[Tensor, "*b n"],
        owner: Int[Tensor, "b"] | None = None,
    ) -> Posterior:  # fmt: skip
        """Posterior [*b, d] given the pairs that `context` marks; with none it is the encoder's own
        prior guess.

        The parameters' leading axes are those of the data, or absent. Where the rows of the data
        are blocks with an `owner`, the posterior is that of every owner, and so are the parameters.
        """
        own = params
        if owner is not None and params["encoder.mean.weight"].dim() > 2:
            own = spread({n: v for n, v in params.items() if n in self._each}, owner)
        hidden = mlp(own, "encoder", difference, len(self.hidden))
        even = hidden.abs() if self.odd else hidden  # what a swap of labels leaves alone
        weight = context.to(hidden.dtype)
        if self.pooling == "poe":
            raw = self._log_var(own, even)
            mean = linear(own, "encoder.mean", hidden)
            return Posterior(*product_of_experts(mean, raw, weight, owner))
        if self.pooling == "attention":
            score = (
                (even @ own["encoder.query"].unsqueeze(-1)).squeeze(-1).masked_fill(~context, -1e30)
            )
            weight = _softmax(score, owner) * weight  # an empty context leaves no weight
        else:
            count = spread_rows(summed(weight.sum(-1, keepdim=True), owner), owner)
            weight = weight / (count + self.shrinkage).clamp_min(1)
        row = weight.unsqueeze(-2)
        mean = linear(params, "encoder.mean", summed(row @ hidden, owner)).squeeze(-2)
        log_var = self._log_var(params, summed(row @ even, owner)).squeeze(-2)
        return Posterior(mean, log_var)

    @property
    def _each(self) -> frozenset[str]:
        """Parameters that are read for every pair (the heads of pooled features are not)."""
        layers = {f"encoder.{i}.{part}" for i in range(len(self.hidden)) for part in PARTS}
        heads = {f"encoder.{head}.{part}" for head in ("mean", "log_var") for part in PARTS}
        return frozenset(layers | {"encoder.query"} | (heads if self.pooling == "poe" else set()))

    def _log_var(self, params: Params, even: Float[Tensor, "*b n w"]) -> Float[Tensor, "*b n d"]:
        return bounded_log_var(linear(params, "encoder.log_var", even))


def _softmax(score: Float[Tensor, "*b n"], owner: Int[Tensor, "b"] | None) -> Float[Tensor, "*b n"]:
    """Over the pairs of a row, or of all rows of an owner."""
    if owner is None:
        return torch.softmax(score, -1)
    most = largest(score.amax(-1), owner)
    each = (score - most[owner].unsqueeze(-1)).exp()
    return each / summed(each.sum(-1), owner)[owner].unsqueeze(-1)
