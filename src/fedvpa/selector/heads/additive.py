"""The additive head: the form of the FedVPA-GP paper, kept for fidelity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.config import Config
from fedvpa.selector.heads import normal
from fedvpa.types import PairBatch, Params


@dataclass(frozen=True)
class AdditiveHead:
    """Margin w . dh + o (u . z): z adds one number to all margins, up to the order of showing.

    So it cannot express a preference between two responses that depends on what they say.
    """

    inputs: int
    latent: int
    scale: float = 0.15
    needs_common: bool = False

    def init(self, generator: torch.Generator) -> Params:
        """Fresh parameters: w = 0, u random."""
        choice = normal(generator, self.latent, std=self.scale)
        return {"reward.weight": torch.zeros(self.inputs), "reward.choice": choice}

    def margin(
        self, params: Params, z: Float[Tensor, "*#b d"], batch: PairBatch
    ) -> Float[Tensor, "... n"]:
        """Reward margin of every pair under z."""
        base = (batch.difference @ params["reward.weight"].unsqueeze(-1)).squeeze(-1)
        return base + batch.order * (z * params["reward.choice"]).sum(-1, keepdim=True)


def build(*, config: Config) -> AdditiveHead:
    """The head of the settings."""
    m = config.model
    return AdditiveHead(m.inputs, m.latent, m.decoder_scale)
