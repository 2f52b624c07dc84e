"""Turns of a conversation from what a record holds: messages of several makes, a transcript, or one
text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedvpa.data.transcripts import HH, RENDERED, Dialect, dialect_of, turns_of
from fedvpa.errors import RecordError, UnusableRecordError
from fedvpa.foreign import harmless
from fedvpa.records import Message, Role

_ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "prompter": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "ai": "assistant",
}  # fmt: skip
SURROGATE = "a lone surrogate; write the file as UTF-8"
_NO_TEXT = ("tool", "function", "observation", "function_call", "ipython", "environment")
"""Roles of turns that no preference over texts can be read from."""


@dataclass
class Agreement:
    """What the records of one source have agreed on: the tags of their transcripts. `plain` is
    where the first text without tags was, `story` where the first with tags that was read as one
    turn."""

    dialect: Dialect | None = None
    since: str = ""
    plain: str = ""
    story: str = ""

    def on(self, dialect: Dialect | None, where: str) -> None:
        """Note what one record has (None: no tags).

        Raises:
            RecordError: other records of the source have something else.
        """
        if dialect in (HH, None) and self.dialect in (HH, None):
            # HH-RLHF's own tags need no agreement
            self.plain = self.plain or (where if dialect is None else "")
            self.dialect = self.dialect or dialect
        elif self.dialect is None and not self.plain:
            self.dialect, self.since = dialect, where
        elif dialect != self.dialect:
            here = f"its turns begin with {dialect}" if dialect else "it has no tags of turns"
            there = f"with {self.dialect}" if self.dialect else "without tags"
            raise RecordError(
                where, "tags of turns differ within the source",
                f"{here}, those of {self.since or self.plain or 'others'} {there}",
            )  # fmt: skip

    def said(self) -> str:
        """What was agreed on, where that is no matter of course."""
        if self.dialect in (HH, None):
            return self.story and (
                f"{self.story}: the prompt has tags as of speakers, and is read as one turn, as"
                " the source's other prompts have none"
            )
        return f"lines that begin with {self.dialect} are read as the turns of user and assistant"


def tidy(text: str, keep_space: bool = False) -> str:
    r"""A text as a turn: ``\n`` at the end of lines, no blank lines before it, no blanks behind it.
    Its indentation stays; a single space, with which completions begin, goes (but for
    `keep_space`).

    >>> tidy("\n    return 1\n"), tidy(" blue.")
    ('    return 1', 'blue.')
    """
    text = re.sub(r"\A(?:[^\S\n]*\n)+", "", text.replace("\r\n", "\n")).rstrip()
    single = text.startswith(" ") and not text[1:2].isspace()
    return text[1:] if single and not keep_space else text


def prompt_of(prompt: Any, where: str, agreed: Agreement | None = None) -> tuple[Message, ...]:
    """A prompt alone: text (a transcript, or one user turn) or a list of messages.

    Raises:
        RecordError: neither, or without a user turn.
    """
    if isinstance(prompt, Mapping):
        prompt = [prompt]
    if is_messages(prompt):
        turns = tuple(messages_of(prompt, "prompt", where))
    elif isinstance(prompt, str):
        turns = _of_text(prompt, where, agreed or Agreement())
    else:
        raise RecordError(
            where, f"wrong type: 'prompt' is {kind_of(prompt)}", "text or a list of messages"
        )
    return checked(turns, where)


def checked(turns: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """The turns of a prompt.

    Raises:
        UnusableRecordError: there is no user turn among them.
        RecordError: a text that no encoding has.
    """
    if not any(m.role == "user" and m.content.strip() for m in turns):
        raise UnusableRecordError(where, "no user turn in the prompt")
    if any(unencodable(m.content) for m in turns):
        raise RecordError(where, "undecodable characters in the prompt", SURROGATE)
    return turns


def _of_text(prompt: str, where: str, agreed: Agreement) -> tuple[Message, ...]:
    """A transcript that waits for an answer, or one user turn."""
    dialect = dialect_of(prompt)
    if dialect is not None:
        turns = turns_of(prompt, dialect)
        waits = turns[-1] == Message("assistant", "")
        talks = waits or (turns[-1].role == "user" and len(turns) > 2)
        if dialect == HH or (talks and (agreed.dialect is not None or not agreed.plain)):
            agreed.on(dialect, where)
            return tuple(turns[:-1] if waits else turns)
        # a story in which User: and Bot: speak is a text like any other
        agreed.story = agreed.story or where
    if prompt.lstrip().startswith(RENDERED):
        raise RecordError(
            where, "the prompt is a conversation that a chat template has written already",
            "give it as a list of messages",
        )  # fmt: skip
    if agreed.dialect not in (None, HH):
        agreed.on(None, where)
    agreed.plain = agreed.plain or where
    return (Message("user", tidy(prompt)),)


def messages_of(raw: list[Any], key: str, where: str) -> list[Message]:
    """Messages with ``role`` and ``content`` (text, or a list of parts), or ``from`` and ``value``.

    Raises:
        RecordError: something else.
        UnusableRecordError: a turn of a tool, or without a text.
    """
    turns = []
    for position, item in enumerate(raw):
        role = item.get("role", item.get("from"))
        content = item.get("content", item.get("value"))
        place = f"message {position} of '{key}'"
        if isinstance(role, str) and role.lower() in _NO_TEXT:
            raise UnusableRecordError(where, f"a turn of a tool in '{key}'")
        if not isinstance(role, str) or role.lower() not in _ROLES:
            shown = harmless(role, 40)
            raise UnusableRecordError(
                where, f"{place} needs a role, not {shown!r}", f"known: {', '.join(_ROLES)}"
            )
        if isinstance(content, list):
            content = _joined_parts(content, place, where)
        if content is None:
            raise UnusableRecordError(where, f"a turn without text in '{key}'", place)
        if not isinstance(content, str):
            raise RecordError(where, f"{place} needs text as content, not {kind_of(content)}")
        last = position == len(raw) - 1 and key != "prompt"
        # the last reply is tidied when it is known what it follows, and a prefill ends as it does
        kept = last or (position == len(raw) - 1 and _ROLES[role.lower()] == "assistant")
        turns.append(Message(_ROLES[role.lower()], content if kept else tidy(content)))
    return turns


def _joined_parts(parts: list[Any], place: str, where: str) -> str:
    texts = []
    for part in parts:
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            raise UnusableRecordError(where, f"a part that is no text in {place}")
    return "".join(texts)


def is_messages(value: Any) -> bool:
    """Whether a value is a list of objects."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(item, Mapping) for item in value)
    )


def unencodable(text: str) -> bool:
    """Whether a text holds lone surrogates, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    names = {
        str: "text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
