"""Robust means of what clients tell beside their updates: second moments of features, and latents.

A sum over clients is whatever one of them wants it to be. Where the settings ask for an aggregator
that withstands attackers, it takes the place of the sum: of the whitening, of the components of a
fit, and of the components that the prior follows in every round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.features.whitening import WhiteningSums
from fedvpa.federated.aggregators import RobustMean
from fedvpa.federated.components import Moments


def robust_whitening(each: Sequence[WhiteningSums], robust: RobustMean) -> WhiteningSums:
    """The sums over all clients, as if every pair were as the robust mean over clients says.

    Every client counts the same, whatever number of pairs it says it has. What is not positive
    semi-definite of the mean is cut off.
    """
    pairs = torch.stack([sums.pairs for sums in each])
    per_pair = {
        "moment": torch.stack([sums.moment / sums.pairs for sums in each]),
        "total": torch.stack([sums.total / sums.pairs for sums in each]),
    }
    found = robust.means(per_pair)
    values, vectors = torch.linalg.eigh((found["moment"] + found["moment"].T) / 2)
    moment = (vectors * values.clamp_min(0)) @ vectors.T
    count = pairs.median() * len(each)
    return WhiteningSums(moment * count, found["total"] * count, count)


def robust_moments(
    share: Float[Tensor, "c *t m"],
    mean: Float[Tensor, "c d"],
    variance: Float[Tensor, "c d"],
    centre: Float[Tensor, "*t m d"],
    robust: RobustMean,
) -> Moments:
    """Moments of every component of every start: the number of its clients times the robust means
    over them. `share` is one-hot over m.

    Of every start, the clients that are farthest from their centre are left out, as many as are
    taken for attackers (trimmed k-means: Cuesta-Albertos et al., 1997): far-off latents would
    otherwise have a component of their own, whatever its mean.
    """
    starts = share.shape[1:-1].numel()  # 1 where there is no such dimension
    table = share.reshape(share.shape[0], starts, -1).clone()
    nearest = torch.einsum("ctm,tmd->ctd", table, centre.reshape(starts, table.shape[-1], -1))
    distance = (mean.unsqueeze(1) - nearest).square().sum(-1)
    farthest = distance.argsort(0, descending=True)[: robust.attackers(share.shape[0])]
    for t in range(starts):
        table[farthest[:, t], t] = 0.0
    told = {"total": mean, "squared": mean.square(), "variance": variance}
    wide = (starts, share.shape[-1], mean.shape[-1])
    sums = {name: torch.zeros(wide, dtype=mean.dtype) for name in told}
    for t in range(starts):
        for m in range(share.shape[-1]):
            members = table[:, t, m].nonzero().squeeze(-1)
            if members.numel():
                found = robust.means({name: value[members] for name, value in told.items()})
                for name, value in found.items():
                    sums[name][t, m] = members.numel() * value
    shape = (*share.shape[1:], mean.shape[-1])
    whole = table.sum(0).view(share.shape[1:])
    return Moments(whole, *(sums[name].view(shape) for name in told))


def from_each(each: Iterable[Moments]) -> tuple[Tensor, Tensor, Tensor]:
    """Shares [c, *t, m], latent means [c, d] and variances [c, d] of clients that told their own
    moments, in rows [r, *t, m(, d)]."""
    rows = list(each)
    share = torch.cat([one.weight for one in rows])
    total, variance = (torch.cat([getattr(o, n) for o in rows]) for n in ("total", "variance"))
    # a client falls to one component of every start: the first start's is its latent
    while total.dim() > 3:
        total, variance = total[:, 0], variance[:, 0]
    return share, total.sum(1), variance.sum(1)
