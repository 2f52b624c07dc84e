"""The contents of a chunk of clients: dealt to contexts and targets, and to folds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedvpa.data.content import Policy, units_of
from fedvpa.federated.batch import ClientStore

ALL, STRADDLES = -1, -2
"""The fold that a model of every pair leaves out; the fold of a row that touches two."""


@dataclass(frozen=True)
class Divider:
    """The units (see `fedvpa.data.content`) of all clients of a store."""

    left: Int[Tensor, "rows"]
    right: Int[Tensor, "rows"]
    pairs: Float[Tensor, "units"]
    offset: Int[Tensor, "clients_and_one"]

    @staticmethod
    def of(store: ClientStore, policy: Policy) -> Divider:
        """Found once for all clients."""
        content = None if store.content is None else store.content.numpy()
        units = units_of(content, store.offset.numpy(), policy)
        return Divider(*(torch.from_numpy(value) for value in units))

    def sides(self, store: ClientStore, clients: Int[Tensor, "c"]) -> Sides:
        """Those of some clients, padded."""
        row, mask = store.rows(clients)
        count = (self.offset[1:] - self.offset[:-1])[clients]
        column = torch.arange(int(count.max()) if count.numel() else 0)
        exists = column < count.unsqueeze(-1)
        place = (self.offset[clients].unsqueeze(-1) + column).clamp_max(len(self.pairs) - 1)
        left, right = (side[row].masked_fill(~mask, 0) for side in (self.left, self.right))
        return Sides(left, right, self.pairs[place] * exists, exists, mask)


class Sides(NamedTuple):
    """The units of a chunk of clients, padded, ready to be dealt."""

    left: Int[Tensor, "c n"]
    right: Int[Tensor, "c n"]
    pairs: Float[Tensor, "c k"]
    exists: Bool[Tensor, "c k"]
    mask: Bool[Tensor, "c n"]

    def dealt(
        self, key: Float[Tensor, "*s c k"], share: Float[Tensor, "*s c"]
    ) -> tuple[Bool[Tensor, "*s c n"], Bool[Tensor, "*s c n"]]:
        """Context and targets: units in the order of their keys go to the context until it has
        `share` of the client's pairs; one unit at least is left for the targets."""
        order = torch.where(self.exists, key, torch.inf).argsort(-1)
        size = self.pairs.expand_as(key).gather(-1, order)
        filled = size.cumsum(-1)
        wanted = share.unsqueeze(-1) * self.pairs.sum(-1, keepdim=True)
        count = self.exists.sum(-1, keepdim=True)
        place = torch.arange(key.shape[-1])
        taken = (filled - 0.5 * size <= wanted) & (place < count - 1)
        context = torch.zeros_like(taken).scatter(-1, order, taken)
        left, right = (
            context.gather(-1, side.expand(*context.shape[:-1], -1))
            for side in (self.left, self.right)
        )
        return left & right & self.mask, ~left & ~right & self.mask


def outside(fold: Int[Tensor, "*r"], left_out: Int[Tensor, "*t"]) -> Bool[Tensor, "..."]:
    """Which rows a model reads from which a fold is left out (`ALL`: none is); rows that touch two
    folds are no part of any other."""
    return (left_out == ALL) | ((fold != left_out) & (fold != STRADDLES))


def folds_of(
    content: Int[Tensor, "rows 3"] | None, place: Int[Tensor, "rows"], folds: int, by_prompt: bool
) -> Int[Tensor, "rows"]:
    """The fold of every row, on which all clients agree without a word: a hash of its prompt, or of
    its responses where prompts are few (`STRADDLES`: they fall into two folds, and the row is read
    by a model of everything alone). Where no two rows share a content, rows are dealt by their
    `place` among their client's."""
    if content is None:
        return place % folds
    if by_prompt:
        return content[:, 0] % folds
    chosen, rejected = content[:, 1] % folds, content[:, 2] % folds
    return torch.where(chosen == rejected, chosen, STRADDLES)
