"""Long steps say how far they are, to whoever listens: a command shows it, a library call does
nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]
"""Called with (step, done, in all)."""
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within it, `listener` hears of every step."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(step: str, done: int, total: int) -> None:
    """Say that `done` of `total` parts of a step are done.

    >>> heard = []
    >>> with listening(lambda *said: heard.append(said)):
    ...     tell("loading", 0, 1)
    >>> heard
    [('loading', 0, 1)]
    """
    listener = _listener.get()
    if listener is not None:
        listener(step, done, total)
