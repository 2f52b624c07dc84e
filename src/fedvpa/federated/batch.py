"""The clients' whitened pairs: one flat table with a range of rows per client, padded only when a
chunk is formed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedvpa.types import PairBatch

SLACK = 8
"""Pairs by which rows of like size may differ in any case."""


class Roster(NamedTuple):
    """Who takes part: the clients' names in a fixed order, and their true groups where known."""

    names: tuple[str, ...]
    groups: tuple[str | None, ...]

    def group_index(self) -> tuple[list[str], Int[Tensor, "clients"]]:
        """Sorted group names, and each client's index into them (-1: it has none)."""
        names = sorted({g for g in self.groups if g is not None})
        index = [-1 if g is None else names.index(g) for g in self.groups]
        return names, torch.tensor(index, dtype=torch.long)


@dataclass(frozen=True)
class ClientStore:
    """Pairs of K clients; client k owns the rows offset[k] to offset[k+1].

    `content` holds hashes of every row's prompt, chosen and rejected response (None: no two rows
    share any).
    """

    names: tuple[str, ...]
    groups: tuple[str | None, ...]
    difference: Float[Tensor, "rows p"]
    common: Float[Tensor, "rows p"] | None
    order: Float[Tensor, "rows"]
    offset: Int[Tensor, "clients_and_one"]
    content: Int[Tensor, "rows 3"] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sizes(self) -> Int[Tensor, "clients"]:
        """Number of pairs of each client."""
        return self.offset[1:] - self.offset[:-1]

    def rows(
        self, clients: Int[Tensor, "c"] | Sequence[int]
    ) -> tuple[Int[Tensor, "c n"], Bool[Tensor, "c n"]]:
        """Where the rows of some clients are, padded to the largest of them, and which exist."""
        clients = torch.as_tensor(clients)
        sizes = self.sizes[clients]
        column = torch.arange(int(sizes.max()) if sizes.numel() else 0)
        return self._row(self.offset[clients], column), column < sizes.unsqueeze(-1)

    def _row(self, begin: Int[Tensor, "b"], column: Int[Tensor, "n"]) -> Int[Tensor, "b n"]:
        last = max(0, self.difference.shape[0] - 1)
        return (begin.unsqueeze(-1) + column).clamp_max(last)

    @property
    def owner(self) -> Int[Tensor, "rows"]:
        """The client of every row."""
        return torch.arange(len(self)).repeat_interleave(self.sizes)

    def batch(self, clients: Int[Tensor, "c"] | Sequence[int], width: int = 0) -> PairBatch:
        """The pairs of some clients, [c, n], padded with zeros to the largest of them; or in blocks
        of `width` pairs, [b, width], of which only a client's last one is padded (an empty client
        has one, too)."""
        if not width:
            return self._batch(*self.rows(clients))
        clients = torch.as_tensor(clients)
        sizes = self.sizes[clients]
        count = (-(-sizes // width)).clamp_min(1)
        owner = torch.arange(len(clients)).repeat_interleave(count)
        before = width * (torch.arange(len(owner)) - (count.cumsum(0) - count)[owner])
        column = torch.arange(width)
        mask = column < (sizes[owner] - before).unsqueeze(-1)
        row = self._row(self.offset[clients][owner] + before, column)
        return self._batch(row, mask)._replace(owner=owner)

    def taking(self, rows: Int[Tensor, "taken"], sizes: Int[Tensor, "clients"]) -> ClientStore:
        """The same clients with some of the rows, in this order, so many of each client."""
        return replace(
            self, difference=self.difference[rows],
            common=None if self.common is None else self.common[rows], order=self.order[rows],
            offset=torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]),
            content=None if self.content is None else self.content[rows],
        )  # fmt: skip

    def _batch(self, row: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"]) -> PairBatch:
        # filled, not multiplied by zero: a neighbour's NaN must not come through
        padding = ~mask.unsqueeze(-1)
        common = None if self.common is None else self.common[row].masked_fill_(padding, 0.0)
        return PairBatch(
            self.difference[row].masked_fill_(padding, 0.0), common, self.order[row] * mask, mask
        )

    @property
    def roster(self) -> Roster:
        """Names and groups of the clients."""
        return Roster(self.names, self.groups)


def build_store(
    names: Sequence[str],
    groups: Sequence[str | None],
    differences: Sequence[Float[Tensor, "_ p"]],
    commons: Sequence[Float[Tensor, "_ p"]] | None,
    orders: Sequence[Float[Tensor, "_"]],
    contents: Sequence[Int[Tensor, "_ 3"]] | None = None,
) -> ClientStore:
    """Concatenate the clients' tables."""
    sizes = torch.tensor([d.shape[0] for d in differences], dtype=torch.long)
    offset = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    common = None if commons is None else torch.cat(list(commons))
    return ClientStore(
        tuple(names),
        tuple(groups),
        torch.cat(list(differences)),
        common,
        torch.cat(list(orders)),
        offset,
        None if contents is None else torch.cat(list(contents)),
    )


def concatenate(first: PairBatch, second: PairBatch) -> PairBatch:
    """Both batches' pairs side by side, along the axis of pairs."""
    common = None
    if first.common is not None and second.common is not None:
        common = torch.cat([first.common, second.common], -2)
    return PairBatch(
        torch.cat([first.difference, second.difference], -2),
        common,
        torch.cat([first.order, second.order], -1),
        torch.cat([first.mask, second.mask], -1),
    )


def select(batch: PairBatch, index: Int[Tensor, "*b m"], keep: Tensor) -> PairBatch:
    """Pick pairs by index along the axis of pairs; `keep` is the new mask (padding is where it is
    False)."""

    def rows(x: Tensor) -> Tensor:
        return x.gather(-2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))

    return PairBatch(
        rows(batch.difference),
        None if batch.common is None else rows(batch.common),
        batch.order.gather(-1, index),
        batch.mask.gather(-1, index) & keep,
    )


def trimmed(batch: PairBatch, index: Int[Tensor, "b"]) -> PairBatch:
    """Some rows of a batch, without the columns behind their last pair."""
    width = int(widths(batch)[index].max()) if index.numel() else 0
    common = None if batch.common is None else batch.common[index, :width]
    return PairBatch(
        batch.difference[index, :width], common, batch.order[index, :width],
        batch.mask[index, :width],
    )  # fmt: skip


def widths(batch: PairBatch) -> Int[Tensor, "b"]:
    """The column behind the last pair of every row."""
    users, columns = batch.mask.shape
    if not columns:
        return torch.zeros(users, dtype=torch.long)
    return (batch.mask * torch.arange(1, columns + 1)).amax(-1)


def like_sized(
    sizes: Int[Tensor, "b"], ratio: float, most: Callable[[int], int]
) -> list[Int[Tensor, "_"]]:
    """Rows in groups of like size, by size: a group's largest has at most `ratio` times the pairs
    of its smallest (and a few more), and a group as many rows as `most` of that size."""
    out: list[list[int]] = []
    least = 0
    for row, size in zip(*(x.tolist() for x in reversed(sizes.sort(stable=True)))):
        if out and size <= ratio * least + SLACK and len(out[-1]) < most(size):
            out[-1].append(row)
        else:
            out.append([row])
            least = size
    return [torch.tensor(group) for group in out]


def first_pairs(batch: PairBatch, size: int) -> PairBatch:
    """The first `size` pairs of every batch."""
    common = None if batch.common is None else batch.common[:, :size]
    return PairBatch(
        batch.difference[:, :size], common, batch.order[:, :size], batch.mask[:, :size]
    )
