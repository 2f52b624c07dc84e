"""From the event loop to threads and back: answers as they come, and work that takes long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedvpa.errors import BadInputError
from fedvpa.policy.engine import Answer, BusyError, Engine, Piece, Request, Ticket, TooLongError
from fedvpa.serving.access import DeniedError

T = TypeVar("T")

COME_BACK = 2.0
"""Seconds after which a request that found no room may try again."""


@dataclass
class Answers:
    """Answers under way: all of the requests begin side by side, or none.

    Raises:
        DeniedError: they cannot be answered, or not now.
    """

    engine: Engine
    requests: Sequence[Request]
    tickets: list[Ticket] = field(default_factory=list)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

        def tell(i: int) -> Callable[[Piece | Exception], None]:
            def told(piece: Piece | Exception) -> None:
                loop.call_soon_threadsafe(self._told.put_nowait, (i, piece))

            return told

        try:
            for i, request in enumerate(self.requests):
                self.tickets.append(self.engine.submit(request, tell(i)))
        except BaseException as error:
            self.cancel()
            if isinstance(error, BusyError):
                raise DeniedError(429, "overloaded", str(error), COME_BACK) from error
            if isinstance(error, TooLongError):
                code = "context_length_exceeded"
                raise DeniedError(400, code, f"messages: {error}") from error
            if isinstance(error, BadInputError):
                raise DeniedError(400, "invalid_value", f"messages: {error}") from error
            raise

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """All pieces of all answers; a failure of one ends all of them.

        Raises:
            RunError: the engine failed.
        """
        left = len(self.requests)
        while left:
            i, piece = await self._told.get()
            if isinstance(piece, Exception):
                raise piece
            left -= bool(piece.finish)
            yield i, piece

    async def whole(self) -> list[Answer]:
        """All answers, once all have ended.

        Raises:
            RunError: the engine failed.
        """
        texts, ends = [""] * len(self.requests), dict[int, Piece]()
        async for i, piece in self.pieces():
            texts[i] += piece.text
            if piece.finish:
                ends[i] = piece
        return [
            Answer(text, self.tickets[i].prompt_tokens, ends[i].tokens, ends[i].finish)
            for i, text in enumerate(texts)
        ]

    def cancel(self) -> None:
        """Draw no more."""
        for ticket in self.tickets:
            ticket.cancel()


class LongWork:
    """Threads of their own for what takes long (the selector reads texts), so that what is quick
    does not wait for it.

    Args:
        most: jobs that wait or run; one more is refused.
    """

    def __init__(self, most: int) -> None:
        # one job at a time goes through the selector's model
        self._threads = ThreadPoolExecutor(1, "fedvpa-reading")
        self._most, self._jobs = max(1, most), 0

    async def __call__(self, do: Callable[..., T], *given: Any) -> T:
        """What `do` returns.

        Raises:
            DeniedError: 429: too much waits already.
        """
        if self._jobs >= self._most:
            raise DeniedError(
                429, "overloaded", f"{self._most} requests wait to be read already", COME_BACK
            )
        self._jobs += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, do, *given)
        finally:
            self._jobs -= 1

    def close(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(cancel_futures=True)
