"""Clients of very different sizes side by side: their pairs in blocks of equal length, and sums
over the blocks of one client.

A block belongs to one client (its `owner`), and a client has as many blocks as its pairs fill. So
what is computed costs as much as the pairs, not as much as the largest client times the number of
clients. Without owners every row is a client, and these functions do nothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def spread(params: dict[str, Tensor], owner: Int[Tensor, "b"] | None) -> dict[str, Tensor]:
    """The parameters of every block, those of its client; parameters with a leading axis of 1 are
    everybody's."""
    if owner is None:
        return params
    return {n: v.index_select(0, owner) if v.shape[0] > 1 else v for n, v in params.items()}


def spread_rows(
    value: Shaped[Tensor, "..."], owner: Int[Tensor, "b"] | None
) -> Shaped[Tensor, "..."]:
    """The clients' rows for each of their blocks, [*s, c, d] to [*s, b, d]."""
    return value if owner is None else value.index_select(-2, owner)


def summed(value: Shaped[Tensor, "..."], owner: Int[Tensor, "b"] | None) -> Shaped[Tensor, "..."]:
    """Sums over the blocks of each client, [b, ...] to [c, ...]."""
    if owner is None:
        return value
    return value.new_zeros(_clients(owner), *value.shape[1:]).index_add(0, owner, value)


def summed_last(
    value: Shaped[Tensor, "..."], owner: Int[Tensor, "b"] | None
) -> Shaped[Tensor, "..."]:
    """The same where blocks are the last axis, [*s, b] to [*s, c]."""
    if owner is None:
        return value
    return value.new_zeros(*value.shape[:-1], _clients(owner)).index_add(-1, owner, value)


def largest(value: Float[Tensor, "b"], owner: Int[Tensor, "b"]) -> Float[Tensor, "c"]:
    """The largest number of each client's blocks; no gradient flows through it."""
    start = value.new_full((_clients(owner),), -torch.inf)
    return start.scatter_reduce(0, owner, value.detach(), "amax")


def _clients(owner: Int[Tensor, "b"]) -> int:
    """Blocks are in the order of their clients, each of which has one at least."""
    return int(owner[-1]) + 1
