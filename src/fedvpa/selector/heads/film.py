"""The FiLM head: z scales and shifts the hidden units of an MLP (Perez et al., 2018)."""

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
class FilmHead:
    """r(h, z) = out . tanh((A h + b) (1 + s(z)) + t(z)), s and t linear in z."""

    inputs: int
    latent: int
    hidden: int = 64
    scale: float = 0.15
    needs_common: bool = True

    def init(self, generator: torch.Generator) -> Params:
        """Fresh parameters."""
        d, h = self.latent, self.hidden
        params = linear_params("reward.0", self.inputs, h, generator)
        scale = self.scale * math.sqrt(d)
        params |= linear_params("reward.film", d, 2 * h, generator, scale=scale)
        return params | {"reward.out": normal(generator, h, std=1 / math.sqrt(h))}

    def margin(
        self, params: Params, z: Float[Tensor, "*#b d"], batch: PairBatch
    ) -> Float[Tensor, "... n"]:
        """Reward margin of every pair under z."""
        scale, shift = linear(params, "reward.film", z.unsqueeze(-2)).chunk(2, -1)
        hidden = linear(params, "reward.0", both_responses(batch))
        hidden = torch.tanh(hidden * (1 + scale) + shift)
        chosen, rejected = (hidden @ params["reward.out"].unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        return chosen - rejected


def build(*, config: Config) -> FilmHead:
    """The head of the settings."""
    m = config.model
    return FilmHead(m.inputs, m.latent, m.reward_hidden, m.decoder_scale)
