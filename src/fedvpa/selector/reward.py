"""A Bradley-Terry reward without a latent preference: one for everybody."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.config import Config
from fedvpa.selector.layers import linear, linear_params
from fedvpa.types import PairBatch, Params


@dataclass(frozen=True)
class SharedReward:
    """A Bradley-Terry reward without a latent: linear in the features, or an MLP on them."""

    inputs: int
    hidden: int = 0

    @property
    def needs_common(self) -> bool:
        """Whether it reads more of a pair than the difference of its features."""
        return self.hidden > 0

    def init(self, generator: torch.Generator) -> Params:
        """Fresh parameters; the linear reward starts at zero."""
        if not self.hidden:
            return {"reward.weight": torch.zeros(self.inputs)}
        params = linear_params("reward.0", self.inputs, self.hidden, generator)
        std = 1 / math.sqrt(self.hidden)
        return params | {"reward.out": torch.randn(self.hidden, generator=generator) * std}

    def margin(self, params: Params, batch: PairBatch) -> Float[Tensor, "*b n"]:
        """Reward margin of every pair."""
        if not self.hidden:
            return (batch.difference @ params["reward.weight"].unsqueeze(-1)).squeeze(-1)
        hidden = torch.tanh(linear(params, "reward.0", both_responses(batch)))
        chosen, rejected = (hidden @ params["reward.out"].unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        return chosen - rejected


def both_responses(batch: PairBatch) -> Float[Tensor, "*b two_n p"]:
    """Features of the chosen responses and, behind them, of the rejected ones: one product reads
    the weights once.

    Raises:
        ValueError: the batch was built without them.
    """
    if batch.common is None:
        raise ValueError(
            "this reward reads the features themselves, but the batch holds only their difference"
        )
    half = batch.difference / 2
    return torch.cat([batch.common + half, batch.common - half], -2)


def build_linear(*, config: Config) -> SharedReward:
    """The linear reward of the settings."""
    return SharedReward(config.model.inputs)


def build_mlp(*, config: Config) -> SharedReward:
    """The MLP reward of the settings."""
    return SharedReward(config.model.inputs, config.model.reward_hidden)
