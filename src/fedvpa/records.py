"""Text records: messages, comparisons, responses. Without tensors: reading data needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Role = Literal["system", "user", "assistant"]


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One private comparison: to `prompt`, the user prefers `chosen` over `rejected`."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    client_id: str | None = None
    group: str | None = None
    source: str = ""

    def reversed(self) -> PreferencePair:
        """The same comparison with the opposite answer."""
        return replace(self, chosen=self.rejected, rejected=self.chosen)

    def content_key(self) -> str:
        """Hash of prompt and *unordered* responses: equal for a pair and its reversal."""
        first, second = sorted((self.chosen, self.rejected))
        return _digest((*[f"{m.role}\x1f{m.content}" for m in self.prompt], first, second))

    def chosen_is_first(self) -> bool:
        """Whether the chosen response would be shown first: a coin thrown by the texts, whatever
        the label."""
        first, _ = sorted((self.chosen, self.rejected))
        return (int(self.content_key()[:8], 16) % 2 == 0) == (self.chosen == first)

    def prompt_key(self) -> str:
        """Hash of the prompt alone."""
        return _digest([f"{m.role}\x1f{m.content}" for m in self.prompt])

    def content_hashes(self) -> tuple[int, int, int]:
        """Hashes, below 2^62, of the prompt, and of the chosen and the rejected response to it."""
        prompt = self.prompt_key()
        keys = (prompt, _digest((prompt, self.chosen)), _digest((prompt, self.rejected)))
        first, second, third = (int(key[:16], 16) >> 2 for key in keys)
        return first, second, third


def _digest(parts: list[str] | tuple[str, ...]) -> str:
    return hashlib.sha256("\x1e".join(parts).encode()).hexdigest()[:32]


class Item(NamedTuple):
    """A prompt and one response to it."""

    prompt: tuple[Message, ...]
    response: str


Progress = Callable[[int, int, float], None]
"""Called with (texts done, texts in all, tokens per second)."""
