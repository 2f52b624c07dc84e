"""The bilinear head: margin = (w + W^T z) . dh (M2), W full or of low rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.config import Config
from fedvpa.selector.heads import normal
from fedvpa.types import PairBatch, Params


@dataclass(frozen=True)
class BilinearHead:
    """z picks a direction of reward: cheap, linear in z, and exactly switchable.

    Args:
        inputs: width p of the whitened features.
        latent: dimensions d of z.
        rank: rank of W (0: full).
        scale: initial scale of z's effect on the margin of a unit-variance feature.
    """

    inputs: int
    latent: int
    rank: int = 0
    scale: float = 0.15
    needs_common: bool = False

    def init(self, generator: torch.Generator) -> Params:
        """Fresh parameters: w = 0, W random."""
        p, d = self.inputs, self.latent
        params = {"reward.weight": torch.zeros(p)}
        if self.rank:
            std = self.scale / math.sqrt(self.rank)
            params["reward.left"] = normal(generator, d, self.rank, std=std)
            params["reward.right"] = normal(generator, self.rank, p, std=1 / math.sqrt(p))
        else:
            params["reward.bilinear"] = normal(generator, d, p, std=self.scale / math.sqrt(p))
        return params

    def margin(
        self, params: Params, z: Float[Tensor, "*#b d"], batch: PairBatch
    ) -> Float[Tensor, "... n"]:
        """Reward margin of every pair under z."""
        return (batch.difference @ self.direction(params, z).unsqueeze(-1)).squeeze(-1)

    def direction(self, params: Params, z: Float[Tensor, "*b d"]) -> Float[Tensor, "*b p"]:
        """w + W^T z."""
        row = z.unsqueeze(-2)
        if self.rank:
            steered = row @ params["reward.left"] @ params["reward.right"]
        else:
            steered = row @ params["reward.bilinear"]
        return params["reward.weight"] + steered.squeeze(-2)


def build(*, config: Config) -> BilinearHead:
    """The head of the settings."""
    m = config.model
    return BilinearHead(m.inputs, m.latent, m.rank, m.decoder_scale)
