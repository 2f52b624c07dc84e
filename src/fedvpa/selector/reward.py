r"""Rewards: how a latent preference steers the choice between two responses (M2), and rewards
without a latent.

Margins are r(chosen) - r(rejected), [*b, n].

| conditioning | margin | source |
|---|---|---|
| `bilinear` | (w + W^T z) . dh, W full or of low rank | a direction of reward picked by z |
| `concat` | MLP([h_c; z]) - MLP([h_r; z]) | VPL |
| `film` | MLP whose hidden units z scales and shifts | FiLM (Perez et al., 2018) |
| `additive` | w . dh + o (u . z), o = +1 if the chosen response was option A, else -1 | the paper |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.selector.layers import linear, linear_params
from fedvpa.types import PairBatch, Params


@dataclass(frozen=True)
class ConditionedReward:
    """A reward that z steers; parameters are passed in."""

    inputs: int
    latent: int
    conditioning: Literal["bilinear", "concat", "film", "additive"] = "bilinear"
    rank: int = 0
    hidden: int = 64
    scale: float = 0.15

    @property
    def needs_common(self) -> bool:
        """Whether it reads more of a pair than the difference of its features."""
        return self.conditioning in ("concat", "film")

    def init(self, generator: torch.Generator) -> Params:
        """Fresh parameters. The reward itself starts at zero, z's effect on it does not (else
        everything collapses)."""

        def normal(*shape: int, std: float) -> Tensor:
            return torch.randn(*shape, generator=generator) * std

        p, d, h = self.inputs, self.latent, self.hidden
        if self.conditioning in ("bilinear", "additive"):
            params = {"reward.weight": torch.zeros(p)}
            if self.conditioning == "additive":
                return params | {"reward.choice": normal(d, std=self.scale)}
            if self.rank:
                params["reward.left"] = normal(d, self.rank, std=self.scale / math.sqrt(self.rank))
                params["reward.right"] = normal(self.rank, p, std=1 / math.sqrt(p))
            else:
                params["reward.bilinear"] = normal(d, p, std=self.scale / math.sqrt(p))
            return params
        if self.conditioning == "concat":
            params = linear_params("reward.0", p + d, h, generator)
        else:
            params = linear_params("reward.0", p, h, generator)
            params |= linear_params(
                "reward.film", d, 2 * h, generator, scale=self.scale * math.sqrt(d)
            )
        return params | {"reward.out": normal(h, std=1 / math.sqrt(h))}

    def margin(
        self, params: Params, z: Float[Tensor, "*#b d"], batch: PairBatch
    ) -> Float[Tensor, "... n"]:
        """Reward margin of every pair under z."""
        if self.conditioning == "bilinear":
            return (batch.difference @ self.direction(params, z).unsqueeze(-1)).squeeze(-1)
        if self.conditioning == "additive":
            base = (batch.difference @ params["reward.weight"].unsqueeze(-1)).squeeze(-1)
            return base + batch.order * (z * params["reward.choice"]).sum(-1, keepdim=True)
        chosen, rejected = self._score(params, z, both_responses(batch)).chunk(2, -1)
        return chosen - rejected

    def direction(self, params: Params, z: Float[Tensor, "*b d"]) -> Float[Tensor, "*b p"]:
        """Direction of the bilinear reward, w + W^T z."""
        row = z.unsqueeze(-2)
        steered = (
            row @ params["reward.left"] @ params["reward.right"]
            if self.rank
            else row @ params["reward.bilinear"]
        )
        return params["reward.weight"] + steered.squeeze(-2)

    def _score(
        self, params: Params, z: Float[Tensor, "*#b d"], x: Float[Tensor, "*#b n p"]
    ) -> Float[Tensor, "... n"]:
        if self.conditioning == "concat":
            first = params["reward.0.weight"]
            split = {
                "x.weight": first[..., : self.inputs, :],
                "z.weight": first[..., self.inputs :, :],
            }
            hidden = (
                linear(split, "x", x)
                + linear(split, "z", z.unsqueeze(-2))
                + params["reward.0.bias"].unsqueeze(-2)
            )
            hidden = torch.tanh(hidden)
        else:
            scale, shift = linear(params, "reward.film", z.unsqueeze(-2)).chunk(2, -1)
            hidden = torch.tanh(linear(params, "reward.0", x) * (1 + scale) + shift)
        return (hidden @ params["reward.out"].unsqueeze(-1)).squeeze(-1)


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
