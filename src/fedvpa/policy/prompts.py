"""Public prompts for the server's stage: read, checked, and what was left out counted."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedvpa.data import personas
from fedvpa.data.messages import prompt_of
from fedvpa.data.reading import HUB, local_path, read_pairs
from fedvpa.data.tables import SUFFIXES, first_row, is_table, member_of, rows_of
from fedvpa.errors import BadInputError, RecordError
from fedvpa.features.chat import ChatFormat
from fedvpa.files import plain_json, write_atomically
from fedvpa.records import Message

Prompt = tuple[Message, ...]
TRAINED = "trained_prompts.json"
"""Hashes of the prompts that a policy was trained on, in its folder."""


@dataclass
class PromptSet:
    """Usable prompts in their order, the group that each comes from (or ``A & B``), and what was
    left out (reason -> count)."""

    prompts: list[Prompt]
    groups: list[str | None] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def some(self, limit: int, seed: int) -> list[Prompt]:
        """A random choice of `limit` prompts, in their order; all of them with 0."""
        if not 0 < limit < len(self.prompts):
            return self.prompts
        return [
            self.prompts[i]
            for i in sorted(random.Random(seed).sample(range(len(self.prompts)), limit))
        ]

    def balanced(self, limit: int, seed: int) -> tuple[list[Prompt], list[str]]:
        """About `limit` prompts (0: all), as many of each group as of any other, at random; and the
        group of each (``all`` where there are none).

        Raises:
            BadInputError: fewer than one prompt a group was asked for.
        """
        names = sorted(set(self.groups), key=str)
        places = {name: [i for i, g in enumerate(self.groups) if g == name] for name in names}
        each = min(
            min(map(len, places.values())), limit // len(names) if limit else len(self.prompts)
        )
        if each < 1:
            raise BadInputError(
                f"--limit {limit}: there are {len(names)} groups of prompts, and every one needs a"
                " prompt"
            )
        chosen = sorted(i for name in names for i in random.Random(seed).sample(places[name], each))
        return [self.prompts[i] for i in chosen], [self.groups[i] or "all" for i in chosen]


def read_prompts(
    source: str, split: str | None, most_tokens: int, chat: ChatFormat, *, to_train: bool = False
) -> PromptSet:
    """Prompts of the persona generator (``personas``; no user is trained on split ``test``), of a
    text file (one per line), of a file of ``{"prompt": ...}``, or of a source of preference pairs
    (their answers are not read).

    Prompts without a user turn at their end, too long ones, repetitions, and those that the chat
    template refuses are left out; `to_train`: also those with the name of a special token in them,
    which the training library takes for the token.

    Raises:
        BadInputError: nothing to read, a broken record, or no usable prompt; the message counts
            what was left out.
    """
    found, groups = _found(source, split)
    result = PromptSet([])
    holders: dict[Prompt, list[str]] = {}
    for prompt, group in zip(found, groups):
        if group is not None and group not in holders.setdefault(prompt, []):
            holders[prompt].append(group)
    seen: set[Prompt] = set()
    for prompt in found:
        reason = "repetition" if prompt in seen else _unusable(prompt, most_tokens, chat, to_train)
        if reason:
            result.skipped[reason] += 1
        else:
            seen.add(prompt)
            result.prompts.append(prompt)
            result.groups.append(
                " & ".join(sorted(holders[prompt])) if holders.get(prompt) else None
            )
    if not result.prompts:
        why = "; ".join(f"{n} x {reason}" for reason, n in result.skipped.items()) or "it is empty"
        raise BadInputError(f"{source}: no usable prompt in it ({why})")
    return result


def _found(source: str, split: str | None) -> tuple[list[Prompt], list[str | None]]:
    """Every prompt of a source, and the group that it comes from."""
    path = local_path(source)
    if source == "personas":
        found: list[Prompt] = [
            (Message("user", text),) for text in personas.prompts(split or "train")
        ]
    elif path.is_file() and path.suffix == ".txt":
        found = [(Message("user", line),) for line in _lines(path)]
    elif path.is_file() and is_table(path.name) and _holds_prompts(path):
        found = [_prompt_of(row, where) for where, row in rows_of(member_of(path))]
    elif path.exists() or source.startswith(HUB):
        pairs = read_pairs(source, split).pairs
        return [pair.prompt for pair in pairs], [pair.group for pair in pairs]
    else:
        kinds = f"personas, a .txt, a file of prompts, or pairs: {', '.join(SUFFIXES)}"
        raise BadInputError(f"{source}: no such file or folder ({kinds})")
    return found, [None] * len(found)


def _unusable(prompt: Prompt, most_tokens: int, chat: ChatFormat, to_train: bool) -> str:
    """Why a prompt is left out, or nothing."""
    if not prompt or prompt[-1].role != "user" or not prompt[-1].content.strip():
        return "no user turn at the end"
    if to_train and any(chat.has_special(m.content) for m in prompt):
        return "the name of a special token in it"
    try:
        length = len(chat.prompt(prompt)[0])
    except BadInputError:
        return "refused by the chat template"
    return f"longer than {most_tokens} tokens" if length > most_tokens else ""


def save_trained_prompts(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Note which prompts a policy is trained on, as hashes."""
    keys = sorted({_key(prompt) for prompt in prompts})
    write_atomically(folder / TRAINED, plain_json(keys))


def trained_prompts(folder: Path) -> set[str]:
    """Hashes of the prompts that a policy was trained on; empty where that was not noted."""
    file = folder / TRAINED
    if not file.is_file():
        return set()
    try:
        return set(json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise BadInputError(f"{file}: damaged: {error}") from error


def without_trained(found: PromptSet, trained: set[str]) -> PromptSet:
    """The prompts that no policy was trained on; the others are counted.

    Raises:
        BadInputError: there are none.
    """
    kept = [i for i, prompt in enumerate(found.prompts) if _key(prompt) not in trained]
    gone = len(found.prompts) - len(kept)
    if not kept:
        raise BadInputError(
            f"--prompts: all {gone} of them were trained on; name others, or --trained-prompts keep"
        )
    skipped = found.skipped + Counter({"trained on": gone} if gone else {})
    return PromptSet(
        [found.prompts[i] for i in kept], [found.groups[i] for i in kept], Counter(skipped)
    )


def _key(prompt: Prompt) -> str:
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:32]


def read_styles(file: str) -> list[str]:
    """System prompts, one a line.

    Raises:
        BadInputError: unreadable or empty.
    """
    found = _lines(Path(file))
    if not found:
        raise BadInputError(f"--styles {file}: is empty; give a system prompt a line")
    return found


def in_style(prompt: Prompt, style: str | None) -> Prompt:
    """The conversation under a system prompt, behind its own one if it has that."""
    if style is None:
        return prompt
    if prompt[0].role == "system":
        return (Message("system", f"{prompt[0].content}\n{style}"), *prompt[1:])
    return (Message("system", style), *prompt)


def _lines(path: Path) -> list[str]:
    r"""Lines that are not empty; they end at ``\n`` alone."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: cannot be read: {error}") from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def _holds_prompts(path: Path) -> bool:
    """Whether the first row is a prompt alone."""
    first = first_row(member_of(path))
    if first is None:
        raise BadInputError(f"{path}: no usable prompt in it (it is empty)")
    row = first[1]
    return isinstance(row, RecordError) or (isinstance(row, dict) and "chosen" not in row)


def _prompt_of(row: object, where: str) -> Prompt:
    if isinstance(row, RecordError):
        raise row
    if not isinstance(row, dict) or "prompt" not in row:
        raise BadInputError(f'{where}: needs "prompt"')
    return prompt_of(row["prompt"], where)
