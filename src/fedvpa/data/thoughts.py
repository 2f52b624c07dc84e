"""Thoughts of reasoning models, which stand before a reply and are no part of it."""

from __future__ import annotations

THOUGHTS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))
"""How reasoning models set their thoughts apart."""


def without_thought(text: str, opened: bool = False) -> str:
    r"""A reply without the thought at its beginning; empty where the thought never ends.

    Args:
        text: the reply.
        opened: whether the thought began before it, in the prompt.

    >>> without_thought("<think>\nHm.\n</think>\n\nYes."), without_thought("Yes.")
    ('Yes.', 'Yes.')
    """
    begun = text.lstrip()
    for begin, end in THOUGHTS:
        before, closed, after = text.partition(end)
        # a thought that began in the prompt ends on a line of its own; else the tag is spoken of
        ends = opened or after.startswith("\n")
        if closed and (begun.startswith(begin) or (ends and begin not in before)):
            return after.lstrip("\n")
        if begun.startswith(begin):
            return ""
    return "" if opened else text
