"""Public prompts for the server's stage: read, checked, and what was left out counted."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedvpa.data import personas
from fedvpa.data.preferences import parse_prompt
from fedvpa.data.reading import SUFFIXES, find_files, read_pairs
from fedvpa.errors import BadInputError
from fedvpa.records import Message

Prompt = tuple[Message, ...]


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
    source: str, split: str | None, most_tokens: int, count_tokens: Callable[[Prompt], int]
) -> PromptSet:
    """Prompts of the persona generator (``personas``; no user is trained on split ``test``), of a
    text file (one a line), of a jsonl file of `{"prompt": ...}`, or of a folder or file of
    preference pairs (their answers are not read). Prompts without a user turn at their end, too
    long ones and repetitions are left out.

    Raises:
        BadInputError: nothing to read, a broken record, or no usable prompt; the message counts
            what was left out.
    """
    path = Path(source).expanduser()
    found: list[Prompt]
    groups: list[str | None] = []
    if source == "personas":
        found = [(Message("user", text),) for text in personas.prompts(split or "train")]
    elif path.is_file() and path.suffix == ".txt":
        found = [
            (Message("user", line.strip()),) for line in _text(path).splitlines() if line.strip()
        ]
    elif path.is_file() and path.suffix == ".jsonl" and _holds_prompts(path):
        found = [
            parse_prompt(_prompt_of(line, f"{path}:{n}"), f"{path}:{n}")
            for n, line in enumerate(_text(path).splitlines(), start=1)
            if line.strip()
        ]
    elif path.exists() and (path.is_file() or find_files(path, split)):
        pairs = read_pairs(source, split).pairs
        found, groups = [pair.prompt for pair in pairs], [pair.group for pair in pairs]
    else:
        kinds = f"personas, a .txt, a .jsonl of prompts, or pairs: {', '.join(SUFFIXES)}"
        raise BadInputError(f"{source}: no such file or folder ({kinds})")
    result = PromptSet([])
    holders: dict[Prompt, list[str]] = {}
    for prompt, group in zip(found, groups):
        if group is not None and group not in holders.setdefault(prompt, []):
            holders[prompt].append(group)
    seen: set[Prompt] = set()
    for prompt in found:
        if not prompt or prompt[-1].role != "user" or not prompt[-1].content.strip():
            result.skipped["no user turn at the end"] += 1
        elif prompt in seen:
            result.skipped["repetition"] += 1
        elif count_tokens(prompt) > most_tokens:
            result.skipped[f"longer than {most_tokens} tokens"] += 1
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


def read_styles(file: str) -> list[str]:
    """System prompts, one a line.

    Raises:
        BadInputError: unreadable or empty.
    """
    try:
        found = [
            line.strip()
            for line in Path(file).read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"--styles {file}: cannot be read: {error}") from error
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


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: cannot be read: {error}") from error


def _holds_prompts(path: Path) -> bool:
    first = next((line for line in _text(path).splitlines() if line.strip()), "")
    if not first:
        raise BadInputError(f"{path}: no usable prompt in it (it is empty)")
    return '"chosen"' not in first


def _prompt_of(line: str, where: str) -> object:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInputError(f"{where}: not JSON: {error.msg}, column {error.colno}") from error
    if not isinstance(record, dict) or "prompt" not in record:
        raise BadInputError(f'{where}: needs "prompt"')
    return record["prompt"]
