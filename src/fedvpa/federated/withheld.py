"""Choices that are kept out of training until the anchors are fitted: by these the number of
anchors is found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fedvpa.federated.batch import ClientStore, like_sized
from fedvpa.federated.episodes import local_draws
from fedvpa.types import PairBatch

WITHHELD = 0.2
"""Share of a client's pairs by which the number of components is chosen."""
SMALLEST_DIVIDED = 4
"""Clients with fewer pairs withhold none."""
PAIRS = 1 << 16
"""Pairs that are read side by side outside of training, at the most."""


@dataclass(frozen=True)
class Withheld:
    """The pairs of a store, a fifth of each client's kept from training up to a round.

    Args:
        store: all pairs.
        seed: of the draw; it is made once.
        until: the last round without the withheld pairs (None: no pairs are withheld).
    """

    store: ClientStore
    seed: int
    until: int | None = None

    def trained_on(self, round_number: int) -> ClientStore:
        """The pairs that take part in a round (counted from 1)."""
        return self._kept if self._withholds(round_number) else self.store

    def divided(
        self, clients: Int[Tensor, "c"], round_number: int
    ) -> tuple[PairBatch, Bool[Tensor, "c n"]]:
        """The clients' pairs, and which of them are withheld in a round; these come last."""
        if not self._withholds(round_number):
            pairs = self.store.batch(clients)
            return pairs, torch.zeros_like(pairs.mask)
        dealt, kept = self._dealt
        pairs = dealt.batch(clients)
        column = torch.arange(pairs.mask.shape[-1])
        return pairs, pairs.mask & (column >= kept[clients].unsqueeze(-1))

    def blocks(self, withhold: bool) -> Iterator[tuple[PairBatch, Bool[Tensor, "c n"]]]:
        """All clients, those of like size side by side: their pairs, and which of them are withheld
        (none unless asked)."""
        last = self.until or 0
        for clients in self._alike:
            yield self.divided(clients, last if withhold else last + 1)

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """What was found for each of `blocks`, a row per client in the store's order."""
        return torch.cat(list(parts))[torch.cat(self._alike).argsort()]

    def _withholds(self, round_number: int) -> bool:
        return self.until is not None and round_number <= self.until

    @cached_property
    def _alike(self) -> list[Int[Tensor, "b"]]:
        return like_sized(self.store.sizes, 2.0, lambda size: PAIRS // max(1, size))

    @cached_property
    def _dealt(self) -> tuple[ClientStore, Int[Tensor, "clients"]]:
        """All pairs, each client's in an order drawn once, and how many of each, the first ones,
        are not withheld."""
        sizes = self.store.sizes
        order = local_draws(self.seed, -1, self.store.names, sizes, 1).order[0]
        withheld = (WITHHELD * sizes).round().long().clamp_min(1)
        return self.store.taking(order, sizes), sizes - torch.where(
            sizes < SMALLEST_DIVIDED, 0, withheld
        )

    @cached_property
    def _kept(self) -> ClientStore:
        dealt, kept = self._dealt
        early = torch.arange(len(dealt.owner)) - dealt.offset[dealt.owner] < kept[dealt.owner]
        return dealt.taking(early.nonzero().squeeze(-1), kept)
