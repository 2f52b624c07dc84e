"""The concatenating head: an MLP on [h; z] (VPL, Poddar et al., 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.config import Config
from fedvpa.selector.heads import normal
from fedvpa.selector.layers import linear, linear_params
from fedvpa.selector.reward import both_responses
from fedvpa.types import PairBatch, Params


@dataclass(frozen=True)
class ConcatHead:
    """r(h, z) = out . tanh(A [h; z] + b), a margin being the difference of two rewards."""

    inputs: int
    latent: int
    hidden: int = 64
    needs_common: bool = True

    def init(self, generator: torch.Generator) -> Params:
        """Fresh parameters."""
        params = linear_params("reward.0", self.inputs + self.latent, self.hidden, generator)
        out = normal(generator, self.hidden, std=1 / math.sqrt(self.hidden))
        return params | {"reward.out": out}

    def margin(
        self, params: Params, z: Float[Tensor, "*#b d"], batch: PairBatch
    ) -> Float[Tensor, "... n"]:
        """Reward margin of every pair under z."""
        first = params["reward.0.weight"]
        features, latent = first[..., : self.inputs, :], first[..., self.inputs :, :]
        split = {"x.weight": features, "z.weight": latent}
        hidden = linear(split, "x", both_responses(batch)) + linear(split, "z", z.unsqueeze(-2))
        hidden = torch.tanh(hidden + params["reward.0.bias"].unsqueeze(-2))
        chosen, rejected = (hidden @ params["reward.out"].unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        return chosen - rejected


def build(*, config: Config) -> ConcatHead:
    """The head of the settings."""
    m = config.model
    return ConcatHead(m.inputs, m.latent, m.reward_hidden)
