"""A batch of unfinished answers and what the model remembers of them, from which rows leave and to
which others come at any time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

SLACK = 32
"""Columns that only padding fills are cut off when they are so many."""


class Rows:
    """Keys and values of b rows, left-padded to t columns; rows are in the order in which they
    came.

    The cache keeps whole sequences for every kind of attention, so that a sliding window is a
    matter of the model's mask.
    """

    def __init__(self, cache: Any, mask: Int[Tensor, "b t"]) -> None:
        self.cache, self.mask = cache, mask

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def place(self) -> Int[Tensor, "b 1"]:
        """Position of every row's next token."""
        return self.mask.sum(-1, keepdim=True)

    def grown(self) -> Int[Tensor, "b u"]:
        """The mask with one more token of every row, u = t + 1."""
        self.mask = pad(self.mask, (0, 1), value=1)
        return self.mask

    def joined(self, other: Rows) -> Rows:
        """Both, those of `other` last."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        for mine, others in zip(self.cache.layers, other.cache.layers):
            for name in ("keys", "values"):
                both = [_padded(getattr(layer, name), width) for layer in (mine, others)]
                setattr(mine, name, torch.cat(both))
        mask = torch.cat([_padded(m, width, -1) for m in (self.mask, other.mask)])
        return Rows(self.cache, mask)

    def kept(self, index: Int[Tensor, "k"]) -> None:
        """Of the rows only these go on."""
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]
        spare = int((self.mask.cumsum(-1) == 0).all(0).sum())
        if spare >= SLACK:
            for layer in self.cache.layers:
                layer.keys = layer.keys[..., spare:, :].contiguous()
                layer.values = layer.values[..., spare:, :].contiguous()
            self.mask = self.mask[:, spare:]


def _padded(value: Tensor, width: int, axis: int = -2) -> Tensor:
    missing = width - value.shape[axis]
    return pad(value, (missing, 0) if axis == -1 else (0, 0, missing, 0))


def left_padded(
    ids: Sequence[Sequence[int]], filler: int, device: torch.device
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Token ids of rows of any lengths, and their mask."""
    width = max(map(len, ids))
    tokens = [[filler] * (width - len(row)) + list(row) for row in ids]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in ids]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def draw_rows(
    logits: Float[Tensor, "b v"], temperature: Float[Tensor, "b"], top_p: Float[Tensor, "b"],
    generators: Sequence[torch.Generator], first: int = 256,
) -> Int[Tensor, "b"]:  # fmt: skip
    """A token per row, from the row's own nucleus (Holtzman et al., 2020) by a Gumbel-max draw of
    its own generator; temperature 0 is the most probable token.

    The nucleus is looked for among the `first` likeliest tokens; a row whose nucleus is larger is
    sorted.
    """
    chosen = logits.argmax(-1)
    drawn = (temperature > 0).nonzero().squeeze(-1)
    if not len(drawn):
        return chosen
    scaled, most = logits[drawn] / temperature[drawn].unsqueeze(-1), top_p[drawn].unsqueeze(-1)
    total = scaled.logsumexp(-1, keepdim=True)
    own = [generators[row] for row in drawn.tolist()]

    def pick(value: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        noise = torch.stack([
            torch.empty(value.shape[-1]).exponential_(generator=own[k]).log() for k in rows.tolist()
        ])  # fmt: skip
        probability = (value - total[rows]).exp()
        before = probability.cumsum(-1) - probability
        nucleus = (value - noise.to(value.device)).masked_fill(before >= most[rows], -torch.inf)
        return index.gather(-1, nucleus.argmax(-1, keepdim=True)).squeeze(-1)

    best, index = scaled.topk(min(first, scaled.shape[-1]), dim=-1)
    wide = (best - total).exp().sum(-1, keepdim=True) < most
    wide = wide.squeeze(-1) & (best.shape[-1] < scaled.shape[-1])
    for rows in ((~wide).nonzero().squeeze(-1), wide.nonzero().squeeze(-1)):
        if len(rows):
            sorted_ = scaled[rows].sort(-1, descending=True) if wide[rows[0]] else None
            value, place = (best[rows], index[rows]) if sorted_ is None else sorted_
            chosen[drawn[rows]] = pick(value, place, rows)
    return chosen
