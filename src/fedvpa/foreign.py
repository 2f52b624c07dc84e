"""Text from outside (names, replies, errors): made harmless and short before it is shown."""

from __future__ import annotations

import logging
import unicodedata
from typing import Any

MOST_CHARACTERS = 200
"""Longer texts are cut."""
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that a terminal acts upon, or that do not show: controls (with newlines and
escapes), directions, surrogates, separators of lines."""


def harmless(text: object, most: int = MOST_CHARACTERS) -> str:
    r"""One line of at most `most` characters that does nothing to a terminal or a log.

    >>> harmless("done\n\x1b[2Jfinished")
    'done\\n\\x1b[2Jfinished'
    """
    given = str(text)
    shown = _escaped(given[:most])
    return shown if len(shown) <= most and len(given) <= most else shown[:most] + "…"


def harmless_lines(text: str) -> str:
    """Text of several lines that does nothing to a terminal but to begin new ones."""
    lines = text.replace("\r\n", "\n").expandtabs(8).split("\n")
    return "\n".join(map(_escaped, lines))


def _escaped(text: str) -> str:
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNSEEN else c
        for c in text
    )


class OneLine(logging.Formatter):
    """A log in which every record begins one line, whatever text it repeats; lines of a traceback
    are set in."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The record on one line."""
        record.message = harmless(record.message, 4000)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """A traceback, line by line."""
        return "\n".join(
            "  " + harmless(line, 400) for line in super().formatException(ei).split("\n")
        )
