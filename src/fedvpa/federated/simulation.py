"""Many clients on one machine: chunks of clients trained side by side, one chunk per thread; and
the sequential twin.

After one step every client has weights of its own, so a large model is limited by memory traffic
and not by arithmetic, and a small one by the cost of starting operations: chunks are bounded in
bytes for the one and in clients for the other. Torch's own threads are set to one meanwhile:
operations on a chunk are too small to divide further.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch

from fedvpa.config import Config

T = TypeVar("T")
C = TypeVar("C")

CHUNK_BYTES = 100 << 20
"""Target size of a chunk's parameters, gradients and two moments (16 bytes a parameter)."""
MOST = 250
"""Clients in a chunk at the most: by then the cost of starting an operation is small beside that of
running it."""
CLIENT = 32
"""What a client's own parameters cost in a local step, in pairs."""
BLOCK = 12
"""What it costs to give a block its client's parameters, in pairs."""
WIDTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Widths of blocks that are considered."""


class Chunk(NamedTuple):
    """Clients that are trained side by side, and how many pairs their blocks have (0: a row per
    client, padded to the largest)."""

    clients: list[int]
    width: int = 0


def best_width(sizes: Sequence[int], block: int = BLOCK) -> int:
    """The width of blocks at which clients of these sizes cost least (0: a row per client)."""
    plain = len(sizes) * max(sizes, default=0)
    cost = {w: sum(-(-n // w) for n in sizes) * (w + block) for w in WIDTHS}
    best = min(cost, key=cost.__getitem__)
    return best if cost[best] < plain else 0


@dataclass(frozen=True)
class Simulation:
    """Runs a function over chunks of a cohort, in order, with bounded memory."""

    backend: Literal["vectorised", "sequential"] = "vectorised"
    chunk: int = 0
    workers: int = 0

    @property
    def debug(self) -> bool:
        """Whether faults are looked for after every step."""
        return self.backend == "sequential"

    def chunks(
        self, cohort: Sequence[int], sizes: Sequence[int], parameters_per_client: int
    ) -> list[Chunk]:
        """Divide a cohort into chunks that cost the same, by the clients' numbers of pairs; the
        division depends on settings and sizes alone, so that sums are repeatable."""
        if self.backend == "sequential":
            return [Chunk([c]) for c in cohort]
        most = self.chunk or max(1, min(MOST, CHUNK_BYTES // (16 * max(1, parameters_per_client))))
        count = max(1, -(-len(cohort) // most))
        # 1. Small clients beside small ones: each chunk then has a width that suits it.
        ordered = sorted(range(len(cohort)), key=lambda i: sizes[i])
        cost = [CLIENT + sizes[i] for i in ordered]
        # 2. Cut where a chunk has its share of what is left, or is full.
        out, left = list[Chunk](), sum(cost)
        while ordered:
            share, at = left / max(1, count - len(out)), 0
            spent = 0
            while at < len(ordered) and at < most and (not at or spent + cost[at] / 2 < share):
                spent += cost[at]
                at += 1
            own = [sizes[i] for i in ordered[:at]]
            out.append(Chunk([cohort[i] for i in ordered[:at]], best_width(own)))
            ordered, cost, left = ordered[at:], cost[at:], left - spent
        return out

    def map(self, function: Callable[[C], T], chunks: Sequence[C]) -> Iterator[T]:
        """Yield the results in the order of the chunks; at most `workers` + 1 of them exist at any
        time."""
        workers = (
            1
            if self.backend == "sequential"
            else min(self.workers or os.cpu_count() or 1, len(chunks))
        )
        with one_thread_each():
            if workers <= 1:
                yield from (function(chunk) for chunk in chunks)
                return
            with ThreadPoolExecutor(
                workers, initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                ahead = [pool.submit(function, chunk) for chunk in chunks[:workers]]
                try:
                    for following in [*chunks[workers:], *[None] * len(ahead)]:
                        yield ahead.pop(0).result()
                        if following is not None:
                            ahead.append(pool.submit(function, following))
                finally:
                    for future in ahead:
                        future.cancel()


def build_simulation(config: Config) -> Simulation:
    """The simulator as the settings say."""
    f = config.federation
    return Simulation(f.backend, f.chunk, f.workers)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Set torch to one intra-op thread, and back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
