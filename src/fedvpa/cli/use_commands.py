"""``fedvpa personalize`` and ``fedvpa score``."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedvpa.cli.reading import read_as_asked, say_notes
from fedvpa.console import Reporter, emit_json
from fedvpa.data.messages import prompt_of, tidy
from fedvpa.data.tables import member_of, rows_of
from fedvpa.errors import BadInputError, RecordError
from fedvpa.experiment.preferences import described
from fedvpa.experiment.use import PreferenceModel
from fedvpa.foreign import harmless
from fedvpa.records import Item


def run_personalize(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Print who the user resembles and how sure that is."""
    source = read_as_asked(arguments, arguments.pairs)
    say_notes(reporter, source)
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


def run_preferences(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """List the preferences with what tells them apart."""
    if arguments.top < 0:
        raise BadInputError("--top: at least 0")
    model, pairs = PreferenceModel(arguments.directory), None
    if arguments.data is not None:
        source = read_as_asked(arguments, arguments.data, arguments.split)
        say_notes(reporter, source)
        pairs = source.pairs
    rows = described(model, pairs, arguments.top)
    for row in rows:
        share = "" if row["share"] is None else f", {row['share']:.0%} of the users"
        near = "" if row["nearest_group"] is None else f", mostly {row['nearest_group']}"
        reporter.say(f"{row['name']}{share}{near}")
        for pair in row["pairs"]:
            reporter.say(f"  to    {harmless(pair['prompt'], 100)}")
            others = f"; the others {pair['margin_of_others']:+.2f}" if len(rows) > 1 else ""
            reporter.say(
                f"  likes {harmless(pair['liked'], 100)}  ({pair['margin']:+.2f} nats{others})"
            )
            reporter.say(f"  over  {harmless(pair['other'], 100)}")
    emit_json(arguments.json, {"run": model.run.identity, "preferences": rows})
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
    """Responses to score, one record per line.

    Raises:
        BadInputError: with file, line and reason.
    """
    items = []
    for where, record in rows_of(member_of(path)):
        if isinstance(record, RecordError):
            raise record
        if (
            not isinstance(record, dict)
            or "prompt" not in record
            or not isinstance(record.get("response"), str)
        ):
            raise BadInputError(f'{where}: needs "prompt" and "response" (text)')
        if not record["response"].strip():
            raise BadInputError(f"{where}: empty response")
        items.append(Item(prompt_of(record["prompt"], where), tidy(record["response"])))
    if not items:
        raise BadInputError(f"{path}: no responses in it")
    return items
