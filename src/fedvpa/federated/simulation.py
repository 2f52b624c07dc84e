"""Many clients on one machine: chunks of clients trained side by side, a chunk to a thread; and its sequential twin.

A chunk is a stack of clients small enough for its parameters, gradients and optimiser state to stay in the cache: after one
step every client has weights of its own, so memory traffic and not arithmetic is the limit. Torch's own threads are set to
one meanwhile: operations on a chunk are too small to divide further.
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

T = TypeVar("T")

CHUNK_BYTES = 6 << 20
"""Target size of a chunk's parameters, gradients and two moments (16 bytes a parameter)."""


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
        """Divide a cohort evenly; the division depends on settings alone, so that sums are repeatable."""
        if self.backend == "sequential":
            return [[c] for c in cohort]
        size = self.chunk or max(1, min(100, CHUNK_BYTES // (16 * max(1, parameters_per_client))))
        count = max(1, -(-len(cohort) // size))
        edges = [round(i * len(cohort) / count) for i in range(count + 1)]
        return [list(cohort[a:b]) for a, b in pairwise(edges)]

    def map(self, function: Callable[[list[int]], T], chunks: Sequence[list[int]]) -> Iterator[T]:
        """Yield the results in the order of the chunks; at most `workers` + 1 of them exist at any time."""
        workers = 1 if self.backend == "sequential" else min(self.workers or os.cpu_count() or 1, len(chunks))
        with one_thread_each():
            if workers <= 1:
                yield from (function(chunk) for chunk in chunks)
                return
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                ahead = [pool.submit(function, chunk) for chunk in chunks[:workers]]
                try:
                    for following in [*chunks[workers:], *[None] * len(ahead)]:
                        yield ahead.pop(0).result()
                        if following is not None:
                            ahead.append(pool.submit(function, following))
                finally:
                    for future in ahead:
                        future.cancel()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Set torch to one intra-op thread, and back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
