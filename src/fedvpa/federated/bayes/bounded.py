"""What clients answer under differential privacy, within its bounds: two sums, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.federated.bayes.messages import Slopes


class Bounded(NamedTuple):
    """Gradients of n models of t folds together, per target, of one client or their sum over
    clients; `bilinear` holds the models' o dimensions one after the other."""

    weight: Float[Tensor, "n t p"]
    bilinear: Float[Tensor, "t o p"]

    @property
    def norm(self) -> Tensor:
        """L2 norm of all."""
        return torch.stack([value.norm() for value in self]).norm()


def bounded_sum(found: Sequence[Slopes], clip: float) -> Bounded:
    """The sum over c clients of gradients [t, c, ...] per target, each client's of all models
    together at most `clip` long (L2)."""
    squared = torch.stack([
        value.square().transpose(0, 1).flatten(1).sum(1)
        for own in found for value in (own.weight, own.bilinear)
    ]).sum(0)  # fmt: skip
    factor = (clip / squared.sqrt().clamp_min(1e-12)).clamp_max(1.0)
    return Bounded(
        torch.stack([torch.einsum("c,tcp->tp", factor, own.weight) for own in found]),
        torch.cat([torch.einsum("c,tcdp->tdp", factor, own.bilinear) for own in found], 1),
    )


def bounded_gains(
    total: Float[Tensor, "k w"], pairs: Float[Tensor, "k"], clip: float
) -> Float[Tensor, "w"]:
    """The sum over k clients of what each option gains over the first one, in nats per target; each
    client's gains are together at most `clip` long (L2).

    Args:
        total: log-probability of a client's targets under each option.
        pairs: how many targets there are.
        clip: the bound.
    """
    gain = (total - total[:, :1]) / pairs.clamp_min(1.0).unsqueeze(-1)
    return (gain * (clip / gain.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)).sum(0)
