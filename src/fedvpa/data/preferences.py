r"""One preference record, as found in the wild, to a checked `PreferencePair`.

Formats, recognised record by record:

* **HH-RLHF** - ``{"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": ...}``; the prompt is
  what both share up to the last ``\n\nAssistant:`` (Bai et al., 2022, arXiv 2204.05862).
* **TRL preference**, standard or conversational, with explicit or implicit prompt (TRL
  documentation, *Dataset formats*).

Optional columns: ``client_id`` and ``group`` (text or whole number).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from fedvpa.errors import RecordError
from fedvpa.foreign import harmless
from fedvpa.records import Message, PreferencePair, Role

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_ROLES = ("system", "user", "assistant")
_NO_COMPARISON = (
    "empty response",
    "identical responses",
    "chosen and rejected have different prompts",
)


def is_no_comparison(error: RecordError) -> bool:
    """Whether the record is well-formed but compares nothing, as a few records of every
    annotated data set do."""
    return error.reason.startswith(_NO_COMPARISON)


def parse_record(record: Any, where: str) -> PreferencePair:
    """Check one record and turn it into a pair.

    Raises:
        RecordError: with `where` and the reason, for anything that is not a usable comparison.
    """
    if not isinstance(record, Mapping):
        raise RecordError(
            where,
            f"expected a JSON object, found {_kind(record)}",
            "one object per line, not a list",
        )
    for key in ("chosen", "rejected"):
        if key not in record:
            found = ", ".join(sorted(map(str, record)))[:120] or "no keys"
            raise RecordError(where, f"missing key '{key}'", f"found: {found}")
    chosen, rejected = record["chosen"], record["rejected"]
    prompt = record.get("prompt")
    for key, value in (("chosen", chosen), ("rejected", rejected), ("prompt", prompt)):
        if isinstance(value, float) and math.isnan(value):
            raise RecordError(where, f"'{key}' is NaN", "the cell is empty; drop the row")
    if _is_messages(chosen) and _is_messages(rejected):
        turns, chosen_text, rejected_text = _conversational(prompt, chosen, rejected, where)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        turns, chosen_text, rejected_text = _textual(prompt, chosen, rejected, where)
    else:
        raise RecordError(
            where,
            f"wrong type: 'chosen' is {_kind(chosen)} and 'rejected' is {_kind(rejected)}",
            "both must be text, or both lists of messages",
        )
    for key, text in (("chosen", chosen_text), ("rejected", rejected_text)):
        if not text.strip():
            raise RecordError(where, f"empty response in '{key}'")
        if _unencodable(text):
            raise RecordError(
                where,
                f"undecodable characters in '{key}'",
                "a lone surrogate; write the file as UTF-8",
            )
    if chosen_text.strip() == rejected_text.strip():
        raise RecordError(where, "identical responses", "a pair must hold two different replies")
    _check_prompt(turns, where)
    return PreferencePair(
        prompt=turns,
        chosen=chosen_text.strip(),
        rejected=rejected_text.strip(),
        client_id=_label(record, "client_id", where),
        group=_label(record, "group", where),
        source=where,
    )


def to_record(pair: PreferencePair) -> dict[str, Any]:
    """A record that `parse_record` reads back to the same pair (but for where it came from)."""
    return {
        "prompt": [m._asdict() for m in pair.prompt],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
        "client_id": pair.client_id,
        "group": pair.group,
    }


def parse_hh_dialogue(text: str, where: str) -> tuple[Message, ...]:
    """Split an HH-RLHF transcript into turns.

    Raises:
        RecordError: if it does not begin with a human turn.
    """
    if not text.lstrip("\n").startswith("Human:"):
        raise RecordError(where, "the transcript does not begin with 'Human:'")
    turns: list[Message] = []
    for block in ("\n\n" + text.lstrip("\n")).split(_HUMAN)[1:]:
        human, *replies = block.split(_ASSISTANT)
        turns.append(Message("user", human.strip()))
        turns.extend(Message("assistant", reply.strip()) for reply in replies)
    return tuple(turns)


def parse_prompt(prompt: Any, where: str) -> tuple[Message, ...]:
    """A prompt alone: text (an HH-RLHF transcript, or one user turn) or a list of messages.

    Raises:
        RecordError: neither, or without a user turn.
    """
    if _is_messages(prompt):
        turns = _messages(prompt, "prompt", where)
    elif isinstance(prompt, str) and prompt.lstrip("\n").startswith("Human:"):
        turns = parse_hh_dialogue(prompt.rstrip().removesuffix("Assistant:").rstrip(), where)
    elif isinstance(prompt, str):
        turns = (Message("user", prompt.strip()),)
    else:
        raise RecordError(
            where, f"wrong type: 'prompt' is {_kind(prompt)}", "text or a list of messages"
        )
    _check_prompt(turns, where)
    return turns


def _check_prompt(turns: tuple[Message, ...], where: str) -> None:
    if not any(m.role == "user" and m.content.strip() for m in turns):
        raise RecordError(where, "no user turn in the prompt")
    if any(_unencodable(m.content) for m in turns):
        raise RecordError(
            where,
            "undecodable characters in the prompt",
            "a lone surrogate; write the file as UTF-8",
        )


def _textual(
    prompt: Any, chosen: str, rejected: str, where: str
) -> tuple[tuple[Message, ...], str, str]:
    if prompt is not None:
        if not isinstance(prompt, str):
            raise RecordError(
                where, f"wrong type: 'prompt' is {_kind(prompt)} although the responses are text"
            )
        return parse_prompt(prompt, where), chosen, rejected
    if chosen.lstrip("\n").startswith("Human:") or rejected.lstrip("\n").startswith("Human:"):
        return _hh(chosen, rejected, where)
    shared = _common_prefix(chosen, rejected)
    if not shared.strip():
        if not chosen.strip() or not rejected.strip():
            raise RecordError(
                where, f"empty response in '{'rejected' if chosen.strip() else 'chosen'}'"
            )
        raise RecordError(
            where,
            "chosen and rejected have different prompts",
            "they share no beginning; add a 'prompt' key",
        )
    if len(shared) in (len(chosen), len(rejected)):
        reason = (
            "identical responses"
            if chosen == rejected
            else "empty response: one reply is the beginning of the other"
        )
        raise RecordError(where, reason)
    return (Message("user", shared.strip()),), chosen[len(shared) :], rejected[len(shared) :]


def _hh(chosen: str, rejected: str, where: str) -> tuple[tuple[Message, ...], str, str]:
    halves = []
    for key, text in (("chosen", chosen), ("rejected", rejected)):
        head, marker, reply = text.rpartition(_ASSISTANT)
        if not marker or _HUMAN in reply:
            raise RecordError(
                where,
                f"no final assistant turn in '{key}'",
                "it must end with '\\n\\nAssistant: ...'",
            )
        halves.append((head, reply))
    if halves[0][0] != halves[1][0]:
        raise RecordError(
            where,
            "chosen and rejected have different prompts",
            "they must agree up to the last reply",
        )
    return parse_hh_dialogue(halves[0][0], where), halves[0][1], halves[1][1]


def _conversational(
    prompt: Any, chosen: list[Any], rejected: list[Any], where: str
) -> tuple[tuple[Message, ...], str, str]:
    sides = [_messages(chosen, "chosen", where), _messages(rejected, "rejected", where)]
    for key, side in zip(("chosen", "rejected"), sides):
        if not side or side[-1].role != "assistant":
            raise RecordError(where, f"no final assistant turn in '{key}'")
    if prompt is None:
        if sides[0][:-1] != sides[1][:-1]:
            raise RecordError(
                where,
                "chosen and rejected have different prompts",
                "they must agree up to the last reply",
            )
        turns = sides[0][:-1]
    else:
        turns = parse_prompt(prompt, where)
        if len(sides[0]) != 1 or len(sides[1]) != 1:
            raise RecordError(
                where, "with an explicit prompt each response must be exactly one assistant message"
            )
    return turns, sides[0][-1].content, sides[1][-1].content


def _messages(raw: list[Any], key: str, where: str) -> tuple[Message, ...]:
    turns = []
    for position, item in enumerate(raw):
        role, content = item.get("role"), item.get("content")
        if role not in _ROLES or not isinstance(content, str):
            raise RecordError(
                where,
                f"message {position} of '{key}' needs a role out of {', '.join(_ROLES)} and text as"
                " content",
            )
        turns.append(Message(cast(Role, role), content.strip()))
    return tuple(turns)


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(item, Mapping) for item in value)
    )


def _common_prefix(first: str, second: str) -> str:
    """Longest common prefix, cut back to a word boundary (as TRL's `extract_prompt` does)."""
    length = next(
        (i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second))
    )
    if length < min(len(first), len(second)):
        while length > 0 and not first[length - 1].isspace():
            length -= 1
    return first[:length]


def _label(record: Mapping[str, Any], key: str, where: str) -> str | None:
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise RecordError(where, f"wrong type: '{key}' is {_kind(value)}", "text or a whole number")
    if _unencodable(str(value)):
        raise RecordError(where, f"undecodable characters in '{key}'")
    name = str(value).strip()
    if harmless(name) != name:  # it is shown, and files are called by it
        raise RecordError(
            where, f"control characters, or too many, in '{key}'", "a plain name on one line"
        )
    return name


def _unencodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates
        return True
    return False


def _kind(value: Any) -> str:
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
