"""``fedvpa personalize`` and ``fedvpa score``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fedvpa.console import Reporter, emit_json
from fedvpa.data.preferences import parse_prompt
from fedvpa.data.reading import read_pairs
from fedvpa.errors import BadInputError
from fedvpa.experiment.use import PreferenceModel
from fedvpa.records import Item


def run_personalize(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Print who the user resembles and how sure that is."""
    source = read_pairs(arguments.pairs, None, arguments.on_bad_record)
    model = PreferenceModel(arguments.directory)
    user = model.personalize(source.pairs)
    reporter.say(
        f"{user.pairs} comparisons; |z| = {float(user.mean.norm()):.2f}, mean sigma"
        f" {float(user.sigma.mean()):.2f}"
    )
    if user.nearest is not None:
        group = f" (mostly {user.nearest_group})" if user.nearest_group else ""
        reporter.say(
            f"nearest prototype: {user.nearest}{group}, probability"
            f" {user.probability[user.nearest]:.3f}"
        )
        reporter.say("all: " + ", ".join(f"{p:.3f}" for p in user.probability))
    hint = (
        "  - no better than a coin: few, noisy, or unlike any preference that the model knows"
        if user.surprise > 0.69
        else ""
    )
    reporter.say(
        f"surprise, each by the others: {user.surprise:.2f} nats per pair (a coin: 0.69){hint}"
    )
    emit_json(arguments.json or "-", user.to_json())
    return 0


def run_score(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Print a score for every response."""
    items = read_responses(Path(arguments.responses))
    model = PreferenceModel(arguments.directory)
    z = model.read_z(arguments.z)
    scores = model.score(items, z).tolist()
    reporter.table(
        "reward, relative to the average training response",
        ["response", "reward"],
        [
            (item.response[:70].replace("\n", " "), f"{score:+.3f}")
            for item, score in zip(items, scores)
        ],
    )
    emit_json(arguments.json or "-", {"scores": scores})
    return 0


def read_responses(path: Path) -> list[Item]:
    """Responses to score, one JSON object per line.

    Raises:
        BadInputError: with file, line and reason.
    """
    items = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInputError(f"{where}: not JSON: {error.msg}, column {error.colno}") from error
        if (
            not isinstance(record, dict)
            or "prompt" not in record
            or not isinstance(record.get("response"), str)
        ):
            raise BadInputError(f'{where}: needs "prompt" and "response" (text)')
        if not record["response"].strip():
            raise BadInputError(f"{where}: empty response")
        items.append(Item(parse_prompt(record["prompt"], where), record["response"].strip()))
    if not items:
        raise BadInputError(f"{path}: no responses in it")
    return items
