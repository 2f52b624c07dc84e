"""The seam behind which answers are drawn: one request streams, many share a batch, each under a z
of its own.

`Engine.submit` returns at once; pieces of the answer are told as they come, from another thread.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from fedvpa.errors import RunError
from fedvpa.records import Message

Finish = Literal["", "stop", "length", "cancelled"]
"""Why an answer ended ('': it goes on)."""


class BusyError(RunError):
    """An engine has as many requests waiting as it holds; asked again later, it may have room."""


class TooLongError(RunError):
    """A conversation leaves no room in the model's context for an answer."""


@dataclass(frozen=True)
class Drawing:
    """How an answer is drawn: at most so many tokens, and no more than fit the context (None: as
    many as fit), from the nucleus `top_p` at a temperature (0: greedy), up to any of the strings
    `stop`, of which none is part of the answer. The same seed draws the same tokens where the
    model's numbers are the same."""

    tokens: int | None = None
    temperature: float = 0.8
    top_p: float = 0.95
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """A conversation to answer, under z [d] (None: the base model itself)."""

    prompt: Sequence[Message]
    z: Float[Tensor, "d"] | None = None
    drawing: Drawing = field(default_factory=Drawing)


class Piece(NamedTuple):
    """Part of an answer: its text, how many tokens have been drawn for the answer by now, and, in
    the last piece, why it ended."""

    text: str
    tokens: int
    finish: Finish = ""


Tell = Callable[[Piece | Exception], None]
"""Takes the pieces, the last one having a `finish`; or the error instead of what is left."""


@runtime_checkable
class Ticket(Protocol):
    """A request under way."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the conversation."""
        ...

    def cancel(self) -> None:
        """Draw no more of it."""
        ...


@runtime_checkable
class Engine(Protocol):
    """Draws answers."""

    name: str

    def submit(self, request: Request, tell: Tell) -> Ticket:
        """Begin an answer.

        Raises:
            BusyError: no room for another.
            TooLongError: it does not fit the context.
            BadInputError: the chat template refuses the conversation.
        """
        ...

    @property
    def load(self) -> dict[str, int]:
        """How many requests run and wait, and the tokens drawn so far."""
        ...

    def close(self) -> None:
        """End what runs, as cancelled, and free the engine."""
        ...


class Answer(NamedTuple):
    """A whole answer."""

    text: str
    prompt_tokens: int
    tokens: int
    finish: Finish


def stream(engine: Engine, request: Request) -> Iterator[Piece]:
    """The pieces of one answer; left early, the rest is not drawn.

    Raises:
        RunError: the engine failed.
    """
    told: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()
    ticket = engine.submit(request, told.put)
    try:
        while True:
            piece = told.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.finish:
                return
    finally:
        ticket.cancel()


def draw(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Whole answers, side by side as far as the engine goes; more than it holds wait here.

    Raises:
        RunError: the engine failed.
    """
    told: queue.SimpleQueue[tuple[int, Piece | Exception]] = queue.SimpleQueue()
    texts, tickets = [""] * len(requests), dict[int, Ticket]()
    found: dict[int, Answer] = {}
    waiting = list(range(len(requests)))
    try:
        while len(found) < len(requests):
            while waiting:
                i = waiting[0]
                try:
                    tickets[i] = engine.submit(requests[i], lambda p, i=i: told.put((i, p)))  # type: ignore[misc]
                except BusyError:
                    if not tickets.keys() - found.keys():  # others fill it, not these
                        raise
                    break
                waiting.pop(0)
            i, piece = told.get()
            if isinstance(piece, Exception):
                raise piece
            texts[i] += piece.text
            if piece.finish:
                found[i] = Answer(texts[i], tickets[i].prompt_tokens, piece.tokens, piece.finish)
    finally:
        for i in tickets.keys() - found.keys():
            tickets[i].cancel()
    return [found[i] for i in range(len(requests))]
