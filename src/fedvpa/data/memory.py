"""Preference data and responses that are in memory already, from Python callers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedvpa.data.messages import prompt_of, tidy
from fedvpa.data.preferences import Form, pairs_of, to_record
from fedvpa.data.reading import PairSet, read_pairs
from fedvpa.errors import BadInputError
from fedvpa.files import write_atomically
from fedvpa.records import Item, PreferencePair


def pairs_from(data: Any, name: str = "pairs") -> list[PreferencePair]:
    """Comparisons as `PreferencePair`s.

    Args:
        data: a path, what `read_pairs` returned, `PreferencePair`s, records (dicts, as in a file),
            a `datasets.Dataset`, or a `pandas.DataFrame` with a row per record.
        name: the caller's argument, for messages.

    Raises:
        BadInputError: anything else; the message names the argument and the entry.

    Example:
        >>> record = {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}
        >>> pairs_from([record])[0].chosen
        'Yes.'
    """
    if isinstance(data, str | Path):
        return read_pairs(str(data)).pairs
    if isinstance(data, PairSet):
        return data.pairs
    if hasattr(data, "columns") and hasattr(data, "to_dict"):  # a table, as of pandas
        data = data.astype(object).where(data.notna(), None).to_dict("records")
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise BadInputError(
            f"{name}: is a {type(data).__name__}; give a path, a list of records or of"
            " fedvpa.PreferencePair, or a datasets.Dataset"
        )
    form = Form()
    return [p for i, entry in enumerate(data) for p in _pairs(entry, f"{name}[{i}]", form)]


def _pairs(entry: Any, where: str, form: Form) -> list[PreferencePair]:
    if isinstance(entry, PreferencePair):
        return [entry]
    if not isinstance(entry, Mapping):
        raise BadInputError(
            f"{where}: is a {type(entry).__name__}, not a record with 'prompt', 'chosen' and"
            " 'rejected', nor a fedvpa.PreferencePair"
        )
    return pairs_of(entry, where, form)


def items_from(items: Any, name: str = "items") -> list[Item]:
    """Responses to prompts as `Item`s.

    Args:
        items: `Item`s, pairs of a prompt and a response, or records with these keys; a prompt is
            text or messages.
        name: the caller's argument, for messages.

    Raises:
        BadInputError: anything else; the message names the argument and the entry.

    Example:
        >>> items_from([("Is tea healthy?", "Yes, in moderation.")])[0].response
        'Yes, in moderation.'
    """
    if isinstance(items, str | Mapping | Item) or not isinstance(items, Iterable):
        raise BadInputError(f"{name}: is a {type(items).__name__}; give a list of fedvpa.Item")
    return [_item(entry, f"{name}[{i}]") for i, entry in enumerate(items)]


def _item(entry: Any, where: str) -> Item:
    if isinstance(entry, Mapping):
        entry = (entry.get("prompt"), entry.get("response"))
    if not isinstance(entry, tuple | list) or len(entry) != 2 or not isinstance(entry[1], str):
        raise BadInputError(
            f"{where}: is a {type(entry).__name__}; a response needs its prompt: give"
            " fedvpa.Item(prompt, response), (prompt, response), or a record with these keys"
        )
    prompt, response = entry
    if isinstance(prompt, tuple):
        prompt = [m._asdict() if hasattr(m, "_asdict") else m for m in prompt]
    if not response.strip():
        raise BadInputError(f"{where}: empty response")
    return Item(prompt_of(prompt, where), tidy(response))


def write_pairs(pairs: Iterable[PreferencePair], path: Path, *, private: bool = False) -> None:
    """The pairs as a JSON-lines file, which `read_pairs` reads back to the same pairs; `private`:
    readable for this user alone."""
    lines = [json.dumps(to_record(pair), ensure_ascii=False) for pair in pairs]
    write_atomically(path, ("\n".join(lines) + "\n").encode(), private=private)
