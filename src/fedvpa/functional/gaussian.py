"""Diagonal Gaussians: densities, divergences and products (nats)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedvpa.functional.segments import summed

LOG_VAR_BOUND = 8.0
"""Log-variances are kept within this bound: exp(8) and its inverse are far from the limits of
float32."""


def bounded_log_var(raw: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """Softly bound a log-variance to (-8, 8); unlike a clamp it never loses its gradient."""
    return LOG_VAR_BOUND * torch.tanh(raw / LOG_VAR_BOUND)


def gaussian_log_prob(
    value: Float[Tensor, "*#b d"], mean: Float[Tensor, "*#b d"], log_var: Float[Tensor, "*#b d"]
) -> Float[Tensor, "..."]:
    """log N(value; mean, diag exp(log_var)), in nats."""
    squared = (value - mean).square() * (-log_var).exp()
    return -0.5 * (squared + log_var + math.log(2 * math.pi)).sum(-1)


def standard_kl_per_dimension(
    mean: Float[Tensor, "*b d"], log_var: Float[Tensor, "*b d"]
) -> Float[Tensor, "*b d"]:
    """KL(N(mean, exp(log_var)) || N(0, 1)) of each dimension (Kingma & Welling, 2014, appendix
    B)."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var)


def gaussian_kl(
    mean: Float[Tensor, "*#b d"],
    log_var: Float[Tensor, "*#b d"],
    other_mean: Float[Tensor, "*#b d"],
    other_log_var: Float[Tensor, "*#b d"],
) -> Float[Tensor, "..."]:
    """KL between two diagonal Gaussians, in nats."""
    ratio = (log_var - other_log_var).exp() + (mean - other_mean).square() * (-other_log_var).exp()
    return 0.5 * (ratio - 1 + other_log_var - log_var).sum(-1)


def product_of_experts(
    mean: Float[Tensor, "*b n d"], log_var: Float[Tensor, "*b n d"], weight: Float[Tensor, "*b n"],
    owner: Int[Tensor, "b"] | None = None,
) -> tuple[Float[Tensor, "*c d"], Float[Tensor, "*c d"]]:  # fmt: skip
    """Product of Gaussian experts and N(0, I): precisions add, so that the variance shrinks with
    every pair (M1, `poe`).

    `weight` switches experts off (0) or on (1); with none on the result is N(0, I). With an `owner`
    of every row, experts of all rows of one owner are multiplied.
    """
    precision = (-log_var).exp() * weight.unsqueeze(-1)
    total = 1 + summed(precision.sum(-2), owner)
    return summed((precision * mean).sum(-2), owner) / total, -total.log()
