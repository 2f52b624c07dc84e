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
from itertools import pairwise
from typing import Literal, TypeVar

import torch

from fedvpa.config import Config

T = TypeVar("T")

CHUNK_BYTES = 100 << 20
"""Target size of a chunk's parameters, gradients and two moments (16 bytes a parameter)."""
MOST = 250
"""Clients in a chunk at the most: by then the cost of starting an operation is small beside that of
running it."""


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

    def chunks(self, cohort: Sequence[int], parameters_per_client: int) -> list[list[int]]:
        """Divide a cohort evenly; the division depends on settings alone, so that sums are
        repeatable."""
        if self.backend == "sequential":
            return [[c] for c in cohort]
        size = self.chunk or max(1, min(MOST, CHUNK_BYTES // (16 * max(1, parameters_per_client))))
        count = max(1, -(-len(cohort) // size))
        edges = [round(i * len(cohort) / count) for i in range(count + 1)]
        return [list(cohort[a:b]) for a, b in pairwise(edges)]

    def map(self, function: Callable[[list[int]], T], chunks: Sequence[list[int]]) -> Iterator[T]:
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
