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

from fedvpa.federated.batch import select
from fedvpa.federated.random import stream
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
    """Noise for E local steps of c clients: order of the pairs, latent noise, uniform noise for the
    Gumbel weights."""

    order: Int[Tensor, "c e n"]
    latent: Float[Tensor, "e s c d"]
    gumbel: Float[Tensor, "e c k"]


def local_draws(
    seed: int, round_number: int, names: Sequence[str], sizes: Int[Tensor, "c"], steps: int,
    draws: DrawSizes = NO_NOISE,
) -> LocalDraws:  # fmt: skip
    """Draw for every client from its own stream; padding pairs come last in the order."""
    samples, latent, components = draws
    width = int(sizes.max())
    keys = torch.full((len(names), steps, width), 2.0)
    noise = torch.empty(len(names), steps, samples, latent)
    uniform = torch.empty(len(names), steps, components)
    for c, name in enumerate(names):
        generator = stream(seed, "local", round_number, name)
        n = int(sizes[c])
        keys[c, :, :n] = torch.rand(steps, n, generator=generator)
        if latent:
            torch.randn(steps, samples, latent, generator=generator, out=noise[c])
        if components:
            torch.rand(steps, components, generator=generator, out=uniform[c])
    return LocalDraws(
        keys.argsort(-1),
        noise.permute(1, 2, 0, 3).contiguous(),
        uniform.transpose(0, 1).contiguous(),
    )


class Episode(NamedTuple):
    """Pairs [c, n] of one step; `context` and `target` mark disjoint subsets of them.

    `rows` says which of the clients' pairs these are (None: all of them, in place).
    """

    pairs: PairBatch
    context: Bool[Tensor, "c n"]
    target: Bool[Tensor, "c n"]
    rows: Int[Tensor, "c n"] | None = None

    def of(self, table: Float[Tensor, "c _ m"]) -> Float[Tensor, "c n m"]:
        """The rows of a table of all the clients' pairs that belong to this step's pairs."""
        return (
            table
            if self.rows is None
            else table.gather(1, self.rows.unsqueeze(-1).expand(-1, -1, table.shape[-1]))
        )


class Episodes:
    """The steps' episodes: a fresh random batch of each client's pairs, split into context and
    target."""

    def __init__(
        self, pairs: PairBatch, order: Int[Tensor, "c e n"], batch_size: int, context_share: float
    ) -> None:
        sizes = pairs.mask.sum(-1)
        clients, steps, width = order.shape
        self._gather = 0 < batch_size < width
        self._batch = min(batch_size, width) if batch_size else width
        count = sizes.clamp_max(self._batch)
        context = torch.round(count * context_share).long()
        context = torch.where(
            count > 1, context.clamp_min(1).minimum(count - 1), torch.zeros_like(count)
        )
        position = torch.arange(self._batch)
        is_context = position < context.unsqueeze(-1)
        is_target = (position >= context.unsqueeze(-1)) & (position < count.unsqueeze(-1))
        # the batches of all steps are picked at once, one after the other along the pairs
        if self._gather:
            self._context, self._target, self._rows = (
                is_context,
                is_target,
                order[:, :, : self._batch],
            )
            kept = (is_context | is_target).unsqueeze(1).expand(-1, steps, -1).reshape(clients, -1)
            self._pairs = select(pairs, self._rows.reshape(clients, -1), kept)
        else:  # all pairs: they are marked where they lie, and nothing is moved
            self._pairs = pairs
            marks = (
                is_context.unsqueeze(1).expand_as(order),
                is_target.unsqueeze(1).expand_as(order),
            )
            empty = torch.zeros_like(order, dtype=torch.bool)
            self._context, self._target = (empty.scatter(-1, order, mark) for mark in marks)

    def __getitem__(self, step: int) -> Episode:
        if not self._gather:
            return Episode(self._pairs, self._context[:, step], self._target[:, step])
        begin, end = step * self._batch, (step + 1) * self._batch
        p = self._pairs
        batch = PairBatch(
            p.difference[:, begin:end],
            None if p.common is None else p.common[:, begin:end],
            p.order[:, begin:end],
            p.mask[:, begin:end],
        )
        return Episode(batch, self._context, self._target, self._rows[:, step])
