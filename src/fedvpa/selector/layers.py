"""Layers as functions of named tensors, with any leading (client) axes in parameters and data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.types import Params


def linear_params(
    name: str, fan_in: int, fan_out: int, generator: torch.Generator, scale: float = 1.0
) -> Params:
    """Weight [in, out] ~ N(0, scale^2 / fan_in), bias [out] at zero."""
    weight = torch.randn(fan_in, fan_out, generator=generator) * (scale / math.sqrt(fan_in))
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(fan_out)}


def mlp_params(name: str, widths: Sequence[int], generator: torch.Generator) -> Params:
    """Parameters of `mlp` for the given widths, input first."""
    out: Params = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        out |= linear_params(f"{name}.{i}", fan_in, fan_out, generator)
    return out


def linear(params: Params, name: str, x: Float[Tensor, "*b n i"]) -> Float[Tensor, "*b n o"]:
    """x W + b; a bias that is not among the parameters is not added."""
    out = x @ params[f"{name}.weight"]
    bias = params.get(f"{name}.bias")
    return out if bias is None else out + bias.unsqueeze(-2)


def mlp(
    params: Params, name: str, x: Float[Tensor, "*b n i"], layers: int
) -> Float[Tensor, "*b n o"]:
    """tanh after every layer."""
    for i in range(layers):
        x = torch.tanh(linear(params, f"{name}.{i}", x))
    return x
