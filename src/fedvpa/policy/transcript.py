"""Tokens of one answer to the text that may be shown: thoughts left out, cut at a stop string, and
never half a character."""

from __future__ import annotations

from typing import Any

from fedvpa.data.thoughts import THOUGHTS, without_thought

LONGEST_OPENING = max(len(begin) for begin, _ in THOUGHTS)
"""Characters after which it is known whether an answer begins with a thought."""


class Transcript:
    """Text of an answer as its tokens come.

    Args:
        tokenizer: of the model.
        stop: strings that end the answer and are no part of it.
        opened: whether the prompt opens a thought.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = (), opened: bool = False) -> None:
        self._tokenizer, self._stop, self._opened = tokenizer, stop, opened
        self._ids: list[int] = []
        self._begin = self._read = 0
        self._text = ""
        self._shown = 0
        self._spoken = False
        self.stopped = False

    def add(self, token: int) -> str:
        """What may be shown after one more token."""
        self._ids.append(token)
        known = self._decoded(self._ids[self._begin : self._read])
        now = self._decoded(self._ids[self._begin :])
        # a character may need several tokens
        if len(now) > len(known) and not now.endswith("\ufffd"):
            self._text += now[len(known) :]
            self._begin, self._read = self._read, len(self._ids)
        return self._show(final=False)

    def end(self) -> str:
        """What is left to show once no token comes any more."""
        now = self._decoded(self._ids[self._begin :])
        self._text += now[len(self._decoded(self._ids[self._begin : self._read])) :]
        self._begin = self._read = len(self._ids)
        return self._show(final=True)

    def _show(self, final: bool) -> str:
        if self.stopped:
            return ""
        if not self._spoken and not self._begun(final):
            return ""
        text = self._text
        for stop in self._stop:
            at = text.find(stop)
            if at >= 0:
                text, self.stopped = text[:at], True
        until = len(text) if final or self.stopped else len(text) - self._held(text)
        shown = text[self._shown : until]
        self._shown = max(self._shown, until)
        return shown

    def _begun(self, final: bool) -> bool:
        """Whether the answer itself has begun: what stands before it is dropped."""
        if not final:
            begun = self._text.lstrip()
            unclear = any(begun.startswith(b) or b.startswith(begun) for b, _ in THOUGHTS)
            closed = any(e in self._text and not self._text.endswith(e) for _, e in THOUGHTS)
            if (self._opened or unclear) and not closed:
                return False
        found = without_thought(self._text, self._opened).lstrip()
        if not found and not final:
            return False
        self._text, self._spoken = found, True
        return True

    def _held(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
