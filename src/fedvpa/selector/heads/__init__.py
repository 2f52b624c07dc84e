"""Reward heads: how a latent preference steers the choice between two responses (M2).

Margins are r(chosen) - r(rejected), [*b, n], under z [*b, d].

| head | margin | source |
|---|---|---|
| `bilinear` | (w + W^T z) . dh, W full or of low rank | a direction of reward picked by z |
| `concat` | MLP([h_c; z]) - MLP([h_r; z]) | VPL (Poddar et al., 2024) |
| `film` | MLP whose hidden units z scales and shifts | FiLM (Perez et al., 2018) |
| `additive` | w . dh + o (u . z), o = +1 if the chosen response was option A, else -1 | the paper |
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.config import Config
from fedvpa.parts import HEADS, builder, part
from fedvpa.types import PairBatch, Params


@runtime_checkable
class Head(Protocol):
    """A reward that z steers; parameters are passed in, with leading axes of clients or without.

    A builder of one is called with ``config=`` alone.
    """

    @property
    def latent(self) -> int:
        """Dimensions d of z."""
        ...

    @property
    def needs_common(self) -> bool:
        """Whether the head reads more of a pair than the difference of its features."""
        ...

    def init(self, generator: torch.Generator) -> Params:
        """Fresh parameters. z should have an effect from the start, or the latent collapses."""
        ...

    def margin(
        self, params: Params, z: Float[Tensor, "*#b d"], batch: PairBatch
    ) -> Float[Tensor, "... n"]:
        """Reward margin of every pair under z, antisymmetric in the two responses."""
        ...


@runtime_checkable
class DirectionalHead(Head, Protocol):
    """A head whose reward under z is a direction in feature space, as a reward decay needs it."""

    def direction(self, params: Params, z: Float[Tensor, "*b d"]) -> Float[Tensor, "*b p"]:
        """The direction."""
        ...


def build_head(*, config: Config) -> Head:
    """The reward head that the settings name (`model.conditioning`)."""
    head: Head = builder(part("reward head", HEADS, config.model.conditioning))(config=config)
    return head


def normal(generator: torch.Generator, *shape: int, std: float) -> Tensor:
    """Independent Gaussian numbers of a shape and a standard deviation."""
    return torch.randn(*shape, generator=generator) * std
