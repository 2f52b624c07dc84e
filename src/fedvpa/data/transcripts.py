r"""Conversations that are one text, with a tag in front of every turn.

HH-RLHF writes ``\n\nHuman: ...\n\nAssistant: ...`` (Bai et al., 2022, arXiv 2204.05862). Other data
use other tags (``User:`` and ``Bot:``, ``### Human:``), at the beginning of a line.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fedvpa.records import Message

_USER = ("human", "user", "prompter", "customer", "instruction", "question")
_ASSISTANT = ("assistant", "bot", "ai", "model", "chatbot", "response", "answer", "gpt")
RENDERED = ("<|im_start|>", "<|user|>", "<|start_header_id|>", "<start_of_turn>", "[INST]")
"""Tags of chat templates that have been applied already."""


class Dialect(NamedTuple):
    """The tags of a user's and of an assistant's turn, as they are written without their colon, and
    whether a blank line stands in front of them."""

    user: str
    assistant: str
    blank: bool

    def __str__(self) -> str:
        return f"'{self.user}:' and '{self.assistant}:'"


HH = Dialect("Human", "Assistant", True)


def newlines(text: str) -> str:
    r"""The text with ``\n`` at the end of its lines."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def dialect_of(text: str) -> Dialect | None:
    """The tags of a transcript; None for a text that is none.

    A text that begins with a user's tag is a transcript if an assistant's tag follows at the
    beginning of a line, or if it begins with a blank line, as those of HH-RLHF do.
    """
    text = newlines(text)
    first = re.match(rf"\s*((?:#{{1,6}} ?)?(?:{'|'.join(_USER)}))[ \t]*:", text, re.IGNORECASE)
    if first is None:
        return None
    tag, rest = first[1], text[first.end() :]
    if tag == HH.user and re.search(r"\n[ \t]*\nAssistant[ \t]*:", rest):
        return HH
    mark = tag[: len(tag) - len(tag.lstrip("# "))]
    for word in _ASSISTANT:  # the likeliest first: a turn may well have a line 'Answer: ...'
        partner = re.search(rf"\n[ \t]*({re.escape(mark)}{word})[ \t]*:", rest, re.IGNORECASE)
        if partner is not None:
            return Dialect(tag, partner[1], False)
    return HH if tag == HH.user and re.match(r"[ \t]*\n[ \t]*\n", text) else None


def looks_like_one(text: str) -> bool:
    """Whether a text looks like a transcript: by how it begins, by lines that begin with tags of
    both speakers, in whatever dress, or by the tags of a chat template."""
    begun = text.lstrip().lstrip("#").lstrip().lower()
    tagged = any(begun.startswith((f"{word}:", f"{word} :")) for word in (*_USER, "system"))
    decorated = all(
        re.search(
            rf"^[ \t]*(?:#{{1,6}}[ \t]*|\*\*|\[)?(?:{'|'.join(words)})[\]*]*[ \t]*(?::|$)",
            newlines(text),
            re.IGNORECASE | re.MULTILINE,
        )
        for words in ((*_USER, "q"), (*_ASSISTANT, "a"))
    )
    return tagged or decorated or any(tag in text for tag in RENDERED)


def turns_of(text: str, dialect: Dialect) -> list[Message]:
    """The turns of a transcript; an assistant's last turn is empty if the text ends with its tag.

    Tags of HH-RLHF count after a blank line, others at the beginning of a line, indented or not. A
    turn's text keeps its indentation; blank lines around it are the format's.
    """
    before = r"(?:\A\s*|\n[ \t]*\n)" if dialect.blank else r"(?:\A\s*|\n[ \t]*)"
    names = f"({re.escape(dialect.user)}|{re.escape(dialect.assistant)})"
    # HH-RLHF's own are written in one way
    case = re.NOFLAG if dialect == HH else re.IGNORECASE
    text = newlines(text)
    found = list(re.finditer(rf"{before}{names}[ \t]*:", text, case))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [
        Message(
            "user" if match[1].lower() == dialect.user.lower() else "assistant",
            _own_text(text[match.end() : end]),
        )
        for match, end in zip(found, ends)
    ]


def _own_text(raw: str) -> str:
    """Blanks behind the tag and blank lines go; the indentation of a first line below the tag
    stays."""
    below = re.sub(r"\A(?:[^\S\n]*\n)+", "", raw)
    return (below if below != raw else raw.lstrip(" \t")).rstrip()
