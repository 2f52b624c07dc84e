"""Prompt and replies of one comparison, from texts or conversations that may or may not begin with
the prompt."""

from __future__ import annotations

from typing import Any

from fedvpa.data.messages import Agreement, is_messages, kind_of, messages_of, prompt_of
from fedvpa.data.transcripts import HH, Dialect, dialect_of, looks_like_one, turns_of
from fedvpa.errors import RecordError, UnusableRecordError
from fedvpa.records import Message


def prompt_and_replies(
    prompt: Any, chosen: Any, rejected: Any, where: str, agreed: Agreement
) -> tuple[tuple[Message, ...], str, str]:
    """The prompt's turns, the chosen and the rejected reply.

    Args:
        prompt: what stands beside the replies, or None.
        chosen: text, a transcript, or messages; `rejected` likewise.
        where: the record's place, for messages.
        agreed: what other records of the source have shown.

    Raises:
        RecordError: they cannot be understood.
        UnusableRecordError: they are no two replies to one prompt.
    """
    if is_messages(chosen) and is_messages(rejected):
        return _conversational(prompt, chosen, rejected, where, agreed)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _textual(prompt, chosen, rejected, where, agreed)
    raise RecordError(
        where,
        f"wrong type: 'chosen' is {kind_of(chosen)} and 'rejected' is {kind_of(rejected)}",
        "both must be text, or both lists of messages",
    )


def _textual(
    prompt: Any, chosen: str, rejected: str, where: str, agreed: Agreement
) -> tuple[tuple[Message, ...], str, str]:
    tagged = [dialect_of(text) for text in (chosen, rejected)]
    if prompt is not None and not (all(tagged) and _repeats(prompt, chosen, tagged[0])):
        if all(one == HH for one in tagged):
            raise RecordError(
                where, "'prompt' is not what 'chosen' and 'rejected' begin with",
                "drop one of the two beginnings",
            )  # fmt: skip
        turns = prompt_of(prompt, where, agreed)
        begin = turns[-1].content
        if isinstance(prompt, str) and all(
            text.startswith(begin) and text[len(begin) :][:1].isspace()
            for text in (chosen, rejected)
        ):
            return turns, chosen[len(begin) :], rejected[len(begin) :]
        return turns, chosen, rejected
    if any(tagged) or any(map(looks_like_one, (chosen, rejected))):
        return _transcripts(chosen, rejected, where, agreed)
    agreed.on(None, where)
    return _without_prompt(chosen, rejected, where)


def _repeats(prompt: Any, chosen: str, dialect: Dialect | None) -> bool:
    """Whether a transcript begins with the prompt that stands beside it."""
    if dialect is None or not isinstance(prompt, str):
        return False
    own = turns_of(prompt, dialect) if dialect_of(prompt) else []
    first = own[0].content if own else prompt.strip()
    return turns_of(chosen, dialect)[0].content == first


def _transcripts(
    chosen: str, rejected: str, where: str, agreed: Agreement
) -> tuple[tuple[Message, ...], str, str]:
    sides = []
    for key, text in (("chosen", chosen), ("rejected", rejected)):
        dialect = dialect_of(text)
        if dialect is None and looks_like_one(text) and not text.lstrip().startswith("Human:"):
            raise RecordError(
                where, f"'{key}' looks like a conversation in one text that is not understood",
                "a tag ('Human:', 'User:', '### Assistant:') belongs at the beginning of a line;"
                " rather give lists of messages",
            )  # fmt: skip
        agreed.on(dialect or HH, where)
        turns = turns_of(text, dialect or HH)
        if len(turns) < 2 or turns[-1].role != "assistant":
            raise RecordError(where, f"no final assistant turn in '{key}'",
                              "it must end with '\\n\\nAssistant: ...'")  # fmt: skip
        sides.append(turns)
    if sides[0][:-1] != sides[1][:-1]:
        raise UnusableRecordError(where, "chosen and rejected have different prompts",
                                  "they must agree up to the last reply")  # fmt: skip
    return tuple(sides[0][:-1]), sides[0][-1].content, sides[1][-1].content


def _without_prompt(chosen: str, rejected: str, where: str) -> tuple[tuple[Message, ...], str, str]:
    """The prompt is what both texts have in common (as TRL's `extract_prompt` finds it)."""
    if not chosen.strip() or not rejected.strip():
        key = "rejected" if chosen.strip() else "chosen"
        raise UnusableRecordError(where, f"empty response in '{key}'")
    if chosen.strip() == rejected.strip():
        raise UnusableRecordError(
            where, "identical responses", "a pair must hold two different replies"
        )
    shared = _common_beginning(chosen, rejected)
    if not shared.strip():
        raise UnusableRecordError(where, "chosen and rejected have different prompts",
                                  "they share no beginning; add a 'prompt' key")  # fmt: skip
    return (
        (Message("user", shared.strip()),), chosen[len(shared) :], rejected[len(shared) :],
    )  # fmt: skip


def _common_beginning(first: str, second: str) -> str:
    """Longest common beginning that leaves something of both, cut back to a boundary of words;
    where a script has none, to any character."""
    most = min(len(first.rstrip()), len(second.rstrip())) - 1
    length = next((i for i in range(most) if first[i] != second[i]), max(0, most))
    while length > 0 and not (
        first[length - 1].isspace() or (_spaceless(first[length - 1]) and _spaceless(first[length]))
    ):
        length -= 1
    return first[:length]


def _spaceless(character: str) -> bool:
    """Whether a character is of a script that is written without blanks between words (Chinese,
    Japanese, Thai, Lao, Khmer, Burmese), or of its punctuation."""
    code = ord(character)
    return any(low <= code <= high for low, high in _SPACELESS)


_SPACELESS = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3000, 0x30FF), (0x3400, 0x9FFF),
    (0xF900, 0xFAFF), (0xFF00, 0xFFEF), (0x20000, 0x3FFFF),
)  # fmt: skip


def _conversational(
    prompt: Any, chosen: list[Any], rejected: list[Any], where: str, agreed: Agreement
) -> tuple[tuple[Message, ...], str, str]:
    """The prompt is what both conversations have in common, or `prompt`, or both in a row."""
    first, second = messages_of(chosen, "chosen", where), messages_of(rejected, "rejected", where)
    for key, side in (("chosen", first), ("rejected", second)):
        if side[-1].role != "assistant":
            raise RecordError(where, f"no final assistant turn in '{key}'")
    length = next(
        (i for i, (a, b) in enumerate(zip(first[:-1], second[:-1])) if a != b),
        min(len(first), len(second)) - 1,
    )
    if len(first) - length != 1 or len(second) - length != 1:
        raise UnusableRecordError(where, "chosen and rejected have different prompts",
                                  "they must agree up to the last reply")  # fmt: skip
    common = tuple(first[:length])
    return _joined(prompt, common, where, agreed), first[-1].content, second[-1].content


def _joined(
    prompt: Any, common: tuple[Message, ...], where: str, agreed: Agreement
) -> tuple[Message, ...]:
    """The whole prompt: what both conversations begin with usually repeats `prompt`."""
    if prompt is None:
        return common
    turns = prompt_of(prompt, where, agreed)
    if not common:
        return turns
    if common[0].role == "assistant":
        return turns + common
    heads = [t[0] for t in (turns, common) if t[0].role == "system"]
    one, two = (tuple(m for m in t if m.role != "system") for t in (turns, common))
    if len({m.content.strip() for m in heads}) < 2:
        # one of them is the beginning, or the end, of the other
        short, longer = sorted((one, two), key=len)
        if longer[: len(short)] == short or longer[len(longer) - len(short) :] == short:
            return (*heads[:1], *longer)
    raise RecordError(
        where, "'prompt' is not what 'chosen' and 'rejected' begin with",
        "drop one of the two beginnings",
    )  # fmt: skip
