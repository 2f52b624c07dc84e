"""All randomness of a client's local round, drawn from a stream of its own.

The stream is named by (seed, purpose, round, client): it does not depend on which clients are
trained side by side, on the backend, or on what happened before, so a run resumes bit for bit
without any generator state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedvpa.federated.batch import like_sized
from fedvpa.federated.random import stream
from fedvpa.functional.segments import summed
from fedvpa.types import PairBatch


class DrawSizes(NamedTuple):
    """How many random numbers a local step reads: samples of a latent of so many dimensions, and
    numbers for Gumbel weights of so many components."""

    samples: int = 1
    latent: int = 0
    components: int = 0


NO_NOISE = DrawSizes()
"""For a step that reads no random numbers but the order of the pairs."""


class LocalDraws(NamedTuple):
    """Noise for E local steps of c clients: the order of each client's pairs (all clients' pairs
    lie one after the other, and so do they here), latent noise, uniform noise for the Gumbel
    weights."""

    order: Int[Tensor, "e rows"]
    latent: Float[Tensor, "e s c d"]
    gumbel: Float[Tensor, "e c k"]


def local_draws(
    seed: int, round_number: int, names: Sequence[str], sizes: Int[Tensor, "c"], steps: int,
    draws: DrawSizes = NO_NOISE,
) -> LocalDraws:  # fmt: skip
    """Draw for every client from its own stream."""
    samples, latent, components = draws
    order = torch.empty(steps, int(sizes.sum()), dtype=torch.long)
    noise = torch.empty(len(names), steps, samples, latent)
    uniform = torch.empty(len(names), steps, components)
    first = sizes.cumsum(0) - sizes
    # clients of like size are sorted side by side
    for group in like_sized(sizes, 2.0, lambda size: len(names)):
        own, begin = sizes[group], first[group]
        width = int(own.max())
        keys = torch.full((len(group), steps, width), 2.0)  # padding comes last
        for i, c in enumerate(group.tolist()):
            generator = stream(seed, "local", round_number, names[c])
            n = int(own[i])
            keys[i, :, :n] = torch.rand(steps, n, generator=generator)
            if latent:
                torch.randn(steps, samples, latent, generator=generator, out=noise[c])
            if components:
                torch.rand(steps, components, generator=generator, out=uniform[c])
        place = begin.unsqueeze(-1) + torch.arange(width)
        real = torch.arange(width) < own.unsqueeze(-1)
        rank = keys.argsort(-1) + begin.view(-1, 1, 1)
        order[:, place[real]] = rank.transpose(0, 1)[:, real]
    return LocalDraws(
        order, noise.permute(1, 2, 0, 3).contiguous(), uniform.transpose(0, 1).contiguous()
    )


class Episode(NamedTuple):
    """Pairs of one step; `context` and `target` mark disjoint subsets of them.

    `rows` says where in the table of all the clients' pairs these are (None: all of them, in
    place).
    """

    pairs: PairBatch
    context: Bool[Tensor, "b n"]
    target: Bool[Tensor, "b n"]
    rows: Int[Tensor, "b n"] | None = None

    def of(self, table: Float[Tensor, "_ _ m"]) -> Float[Tensor, "b n m"]:
        """The rows of a table of all the clients' pairs that belong to this step's pairs."""
        return table if self.rows is None else table.flatten(0, 1)[self.rows]


class Episodes:
    """The steps' episodes: a fresh random batch of each client's pairs, split into context and
    target.

    Args:
        pairs: all the clients' pairs, a row per client or in blocks.
        order: of each client's pairs in every step (see `LocalDraws`).
        batch_size: pairs of a client per step (0: all).
        context_share: the context's share of them; at least one pair is a target.
    """

    def __init__(
        self, pairs: PairBatch, order: Int[Tensor, "e rows"], batch_size: int, context_share: float
    ) -> None:
        sizes = summed(pairs.mask.sum(-1), pairs.owner)
        largest = int(sizes.max()) if sizes.numel() else 0
        self._gather = 0 < batch_size < largest
        count = sizes.clamp_max(batch_size) if batch_size else sizes
        context = torch.round(count * context_share).long()
        context = torch.where(
            count > 1, context.clamp_min(1).minimum(count - 1), torch.zeros_like(count)
        )
        # where in the table of pairs, which has padding, each pair lies
        cell = pairs.mask.flatten().nonzero().squeeze(-1)
        first = sizes.cumsum(0) - sizes
        if self._gather:  # the batches of all steps are picked at once
            position = torch.arange(batch_size)
            self._context = position < context.unsqueeze(-1)
            real = position < count.unsqueeze(-1)
            self._target = real & ~self._context
            place = (first.unsqueeze(-1) + position).clamp_max(max(0, order.shape[-1] - 1))
            self._rows = cell[order[:, place]] if len(cell) else place.expand(len(order), -1, -1)
            self._pairs = _picked(pairs, self._rows, real)
        else:  # all pairs: they are marked where they lie, and nothing is moved
            owner = torch.arange(len(sizes)).repeat_interleave(sizes)
            early = torch.arange(len(owner)) - first[owner] < context[owner]
            marked = torch.zeros(len(order), pairs.mask.numel(), dtype=torch.bool)
            marked.scatter_(-1, cell[order], early.expand_as(order))
            self._pairs, self._context = pairs, marked.view(-1, *pairs.mask.shape)

    def __getitem__(self, step: int) -> Episode:
        if not self._gather:
            context = self._context[step]
            return Episode(self._pairs, context, self._pairs.mask & ~context)
        p = self._pairs
        batch = PairBatch(
            p.difference[step], None if p.common is None else p.common[step], p.order[step], p.mask
        )
        return Episode(batch, self._context, self._target, self._rows[step])


def _picked(pairs: PairBatch, rows: Int[Tensor, "e c m"], real: Bool[Tensor, "c m"]) -> PairBatch:
    """Pairs of a table by their places in it; those that are not `real` are zeros."""

    def of(value: Float[Tensor, "b n p"]) -> Float[Tensor, "e c m p"]:
        return value.flatten(0, 1)[rows].masked_fill_(~real.unsqueeze(-1), 0.0)

    common = None if pairs.common is None else of(pairs.common)
    return PairBatch(of(pairs.difference), common, pairs.order.flatten()[rows] * real, real)
