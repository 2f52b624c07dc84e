r"""One record, as found in the wild, to checked `PreferencePair`s.

Forms, recognised record by record (docs/data-formats.md shows one of each):

* **TRL preference** (TRL documentation, *Dataset formats*): ``prompt``, ``chosen``, ``rejected`` as
  text or as messages; without a prompt, it is what both have in common.
* **HH-RLHF** and other transcripts: see `fedvpa.data.transcripts`.
* several ``rejected`` (or ``chosen``) replies; ``response_a``, ``response_b`` and ``preference``;
  rated ``completions``.

Beside them, ``system``, ``client_id`` and ``group``.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedvpa.data.messages import (
    SURROGATE,
    Agreement,
    checked,
    is_messages,
    kind_of,
    tidy,
    unencodable,
)
from fedvpa.data.replies import prompt_and_replies
from fedvpa.data.thoughts import without_thought
from fedvpa.errors import RecordError, TieError, UnusableRecordError
from fedvpa.foreign import harmless
from fedvpa.records import Message, PreferencePair

FIELDS = (
    "prompt", "chosen", "rejected", "client_id", "group", "system", "input", "response_a",
    "response_b", "preference", "completions", "scores",
)  # fmt: skip
"""What a column can be said to hold."""
PROMPTS = ("prompt", "instruction", "question", "conversations", "messages")
"""Columns that are read as the prompt; the first one that is there."""
_OTHERWISE = {
    "generations": "completions", "ratings": "scores", "chosen_response": "chosen",
    "rejected_response": "rejected",
}  # fmt: skip
"""Names that other tools write (distilabel, Argilla)."""
SEEN = (
    *FIELDS,
    *PROMPTS,
    *_OTHERWISE,
    "history",
    "label",
    "completion",
    "utterance_id",
    "model_response",
)
"""Columns whose contents are looked at."""
_FIRST = ("a", "response_a", "model_a", "first", "left")
_SECOND = ("b", "response_b", "model_b", "second", "right")
_TIES = ("tie", "ties", "both", "neither", "equal", "draw", "same", "tie (bothbad)")


@dataclass
class Form:
    """How the records of one source are read: which columns hold what, and what they have agreed
    on so far.

    Args:
        columns: field (of `FIELDS`) to the name of its column.
        score_margin: ratings have to differ by more than this.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    score_margin: float = 0.0
    agreed: Agreement = field(default_factory=Agreement)


def pairs_of(record: Any, where: str, form: Form | None = None) -> list[PreferencePair]:
    """Check one record and turn it into pairs: one, or several where it holds several replies.

    Raises:
        RecordError: with `where` and the reason, for anything that is not a usable comparison.
        UnusableRecordError: the record is well-formed and compares nothing.
    """
    form = form or Form()
    if not isinstance(record, Mapping):
        raise RecordError(
            where, f"expected an object, found {kind_of(record)}", "one record per line, not a list"
        )
    row = _renamed(record, form.columns, where)
    client, group = (_label(row, key, where) for key in ("client_id", "group"))
    made: dict[tuple[Any, ...], PreferencePair] = {}
    nothing: UnusableRecordError | None = None
    for chosen, rejected in _comparisons(row, where, form):
        try:
            pair = _pair(row, chosen, rejected, where, form)
        except UnusableRecordError as error:
            nothing = nothing or error
            continue
        named = PreferencePair(*pair, client_id=client, group=group, source=where)
        made.setdefault(pair, named)
    if not made and nothing is not None:
        raise nothing
    return list(made.values())


def to_record(pair: PreferencePair) -> dict[str, Any]:
    """A record that `pairs_of` reads back to the same pair (but for where it came from)."""
    return {
        "prompt": [m._asdict() for m in pair.prompt],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
        "client_id": pair.client_id,
        "group": pair.group,
    }


def to_transcripts(pair: PreferencePair) -> dict[str, Any]:
    r"""The pair as HH-RLHF writes it.

    Raises:
        RecordError: it has a system turn, or a text with ``\n\nHuman:`` or ``\n\nAssistant:`` in
            it; the format has no way to say that.
    """
    head = "".join(
        f"\n\n{'Human' if m.role == 'user' else 'Assistant'}: {m.content}" for m in pair.prompt
    )
    record = {
        "chosen": f"{head}\n\nAssistant: {pair.chosen}",
        "rejected": f"{head}\n\nAssistant: {pair.rejected}",
        "client_id": pair.client_id,
        "group": pair.group,
    }
    try:
        again = [(p.prompt, p.chosen, p.rejected) for p in pairs_of(record, pair.source)]
    except RecordError:
        again = []
    if again != [(pair.prompt, pair.chosen, pair.rejected)]:
        raise RecordError(
            pair.source, "cannot be written as an HH-RLHF transcript",
            "it has a system turn, or a tag or an indentation within a text; write it as trl",
        )  # fmt: skip
    return record


# which replies are compared


def _comparisons(row: Mapping[str, Any], where: str, form: Form) -> Iterator[tuple[Any, Any]]:
    """Every (chosen, rejected) of a record, as they stand there."""
    if "chosen" in row and "rejected" in row:
        for chosen in _alternatives(row["chosen"], "chosen", where):
            for rejected in _alternatives(row["rejected"], "rejected", where):
                yield chosen, rejected
    elif "response_a" in row and "response_b" in row:
        yield _preferred(row, where)
    elif "completions" in row:
        yield from _rated(row, where, form.score_margin)
    else:
        raise _no_comparison(row, where)


def _alternatives(value: Any, key: str, where: str) -> list[Any]:
    """The replies in a cell: one, or a list of them."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise UnusableRecordError(where, f"empty response in '{key}'", "there is nothing in it")
    if isinstance(value, Mapping):
        return [[value]]
    if isinstance(value, list) and not is_messages(value):
        value = [one for one in value if one is not None]
        if not value:
            raise UnusableRecordError(where, f"empty response in '{key}'", "there is nothing in it")
        if all(isinstance(v, str) for v in value) or all(is_messages(v) for v in value):
            return value
        raise RecordError(
            where, f"wrong type: '{key}' is a list of unlike things",
            "give text, messages, or a list of texts",
        )  # fmt: skip
    return [value]


def _preferred(row: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    if "preference" not in row:
        raise RecordError(
            where, "missing key 'preference'", "it says which of response_a and response_b is"
            " better: a or b, or 0 or 1; --column preference=NAME names its column"
        )  # fmt: skip
    said, pair = row["preference"], (row["response_a"], row["response_b"])
    number = None if isinstance(said, bool) or not isinstance(said, numbers.Real) else float(said)
    word = said.strip().lower() if isinstance(said, str) else ""
    if number == 0 or word in (*_FIRST, "0"):
        return pair
    if number == 1 or word in (*_SECOND, "1"):
        return pair[1], pair[0]
    if word in _TIES or said is None:
        raise TieError(where, "no preference between the two responses")
    raise RecordError(
        where, f"preference {harmless(said, 40)!r} is not understood",
        "a or b (also A, model_a, first, ...), a tie, or the number 0 (first) or 1 (second)",
    )  # fmt: skip


def _rated(row: Mapping[str, Any], where: str, margin: float) -> Iterator[tuple[Any, Any]]:
    """Pairs of rated completions whose ratings differ by more than `margin`."""
    completions, scores = row["completions"], row.get("scores")
    if not isinstance(completions, list) or not completions:
        raise RecordError(where, f"wrong type: 'completions' is {kind_of(completions)}", "a list")
    if scores is None and all(isinstance(c, Mapping) for c in completions):
        # UltraFeedback's
        scores = [next((c[k] for k in _SCORES if c.get(k) is not None), None) for c in completions]
        completions = [c.get("response", c.get("content")) for c in completions]
    if not isinstance(scores, list) or len(scores) != len(completions):
        raise RecordError(
            where, "'completions' without a score for each",
            "a list 'scores' of the same length, or completions with an overall_score",
        )  # fmt: skip
    rated = [
        (text, float(score))
        for text, score in zip(completions, scores)
        if text is not None and _is_number(score)
    ]
    found = [(a, b) for a, x in rated for b, y in rated if x - y > margin]
    if not found:
        raise TieError(where, f"no two ratings differ by more than {margin:g}")
    yield from found


_SCORES = ("overall_score", "score", "rating")


def _is_number(score: Any) -> bool:
    try:
        return not isinstance(score, bool) and math.isfinite(float(score))
    except (TypeError, ValueError, OverflowError):
        return False


def _no_comparison(row: Mapping[str, Any], where: str) -> RecordError:
    """What is missing, and what it would take."""
    found = f"found: {', '.join(sorted(map(str, row)))[:120] or 'no keys'}"
    missing = next((k for k in ("chosen", "rejected") if k not in row), "chosen")
    if "label" in row and ("completion" in row or "chosen" not in row):
        return RecordError(
            where, f"missing key '{missing}': single responses with a label (KTO)",
            "a comparison needs two responses to one prompt: pair one that was liked with one that"
            " was not",
        )  # fmt: skip
    if "utterance_id" in row or "model_response" in row:
        return RecordError(where, f"missing key '{missing}'", "PRISM? fedvpa data convert --from"
                           " prism SOURCE")  # fmt: skip
    if "chosen" in row or "rejected" in row:
        return RecordError(where, f"missing key '{missing}'", found)
    return RecordError(
        where, f"missing key '{missing}'", f"{found}; --column chosen=NAME names its column, and"
        " `fedvpa data convert --from` reads published data sets"
    )  # fmt: skip


# one comparison


def _pair(
    row: Mapping[str, Any], chosen: Any, rejected: Any, where: str, form: Form
) -> tuple[tuple[Message, ...], str, str]:
    """Prompt, chosen and rejected reply."""
    prompt = next((row[key] for key in PROMPTS if row.get(key) is not None), None)
    if isinstance(prompt, float) and math.isnan(prompt):
        raise RecordError(where, "'prompt' is NaN", "the cell is empty; drop the row")
    if isinstance(prompt, str) and isinstance(row.get("input"), str) and row["input"].strip():
        prompt = f"{prompt}\n{row['input']}"
    prompt = _with_history(prompt, row.get("history"), where)
    if "prompt" not in row and is_messages(prompt) and isinstance(chosen, str):
        # `messages` may hold the chosen answer as well
        last = prompt[-1]
        said = str(last.get("content", last.get("value"))).strip()
        if len(prompt) > 1 and said in (chosen.strip(), str(rejected).strip()):
            prompt = prompt[:-1]
    turns, first, second = prompt_and_replies(prompt, chosen, rejected, where, form.agreed)
    system = row.get("system")
    if isinstance(system, str) and system.strip() and turns[:1] and turns[0].role != "system":
        turns = (Message("system", tidy(system)), *turns)
    continues = bool(turns) and turns[-1].role == "assistant"
    first, second = (tidy(text, keep_space=continues) for text in (first, second))
    for key, text in (("chosen", first), ("rejected", second)):
        if not without_thought(text).strip():
            raise UnusableRecordError(where, f"empty response in '{key}'")
        if unencodable(text):
            raise RecordError(where, f"undecodable characters in '{key}'", SURROGATE)
    if without_thought(first) == without_thought(second):
        raise UnusableRecordError(
            where, "identical responses", "a pair must hold two different replies"
        )
    return checked(turns, where), first, second


def _with_history(prompt: Any, history: Any, where: str) -> Any:
    """The prompt behind the turns of LLaMA-Factory's ``history``: pairs of question and answer."""
    if not isinstance(history, list) or not history or not isinstance(prompt, str):
        return prompt
    turns: list[dict[str, Any]] = []
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise RecordError(where, "'history' is no list of pairs of question and answer")
        turns += [{"role": r, "content": c} for r, c in zip(("user", "assistant"), turn)]
    return [*turns, {"role": "user", "content": prompt}]


# columns


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """The record under the names of `FIELDS`."""
    row = {key: _plain(value) for key, value in record.items()}
    for name, column in columns.items():
        if column not in record:
            found = ", ".join(sorted(map(str, record)))[:120]
            raise RecordError(where, f"no column '{column}' (for {name})", f"found: {found}")
        row[name] = _plain(record[column])
    for other, name in _OTHERWISE.items():
        if other in row:
            row.setdefault(name, row[other])
    return row


def _plain(value: Any) -> Any:
    """Arrays, as pandas has them, as lists."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, float) else value


def _label(row: Mapping[str, Any], key: str, where: str) -> str | None:
    """The name of a client or a group; 3, 3.0 and "3" are one. None where there is none."""
    value = row.get(key)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | numbers.Integral):
        raise RecordError(
            where, f"wrong type: '{key}' is {kind_of(value)}", "text or a whole number"
        )
    if not str(value).strip():
        return None
    if isinstance(value, str):
        # as a data frame with an empty cell writes whole numbers
        value = re.sub(r"\A\s*(-?[0-9]+)\.0+\s*\Z", r"\1", value)
    if unencodable(str(value)):
        raise RecordError(where, f"undecodable characters in '{key}'")
    name = str(value).strip()
    if harmless(name) != name:  # it is shown, and files are called by it
        raise RecordError(
            where, f"control characters, or too many, in '{key}'", "a plain name on one line"
        )
    return name


def columns_of(text: Sequence[str]) -> dict[str, str]:
    """Columns by field, of ``FIELD=COLUMN`` each.

    Raises:
        ValueError: not of that form, or not a field.

    >>> columns_of(["client_id=user_id"])
    {'client_id': 'user_id'}
    """
    out = {}
    for part in text:
        name, equals, column = part.partition("=")
        if not equals or not column:
            raise ValueError(f"'{part}' is not FIELD=COLUMN, as in client_id=user_id")
        out[name] = column
    return out
