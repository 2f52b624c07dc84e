"""``fedvpa data inspect``, ``convert`` and ``personas``."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from fedvpa.cli.reading import read_as_asked, say_notes
from fedvpa.config import PersonasConfig, build_config
from fedvpa.console import Reporter, emit_json
from fedvpa.data.inspection import inspect_pairs
from fedvpa.data.personas import ATTRIBUTES, UNSEEN, personas, user_vector
from fedvpa.data.preferences import to_record, to_transcripts
from fedvpa.data.published import read_published
from fedvpa.errors import BadInputError, RecordError
from fedvpa.files import claim, write_atomically
from fedvpa.foreign import harmless


def run_inspect(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Print what a source holds, and three of its records as they were understood."""
    source, test = read_as_asked(arguments, arguments.source, arguments.split), None
    if arguments.test_split:
        test = read_as_asked(arguments, arguments.source, arguments.test_split)
    found = inspect_pairs(source, test)
    reporter.say(
        f"{arguments.source}: {found['pairs']} pairs, {found['prompts']} prompts,"
        f" {found['responses']} responses, {found['clients']} client ids"
    )
    say_notes(reporter, source)
    sizes = found["pairs_per_client"]
    if sizes:
        reporter.say(
            f"pairs per client id: {sizes['least']} to {sizes['most']}, median {sizes['median']:g};"
            f" {found['without_client_id']} pairs without one"
        )
    rows = [
        (
            name or "(none)",
            str(g["pairs"]),
            f"{g['prompt_words']:.0f}",
            f"{g['chosen_words']:.0f}",
            f"{g['rejected_words']:.0f}",
        )
        for name, g in found["groups"].items()
    ]
    reporter.table(
        "groups (median words)", ["group", "pairs", "prompt", "chosen", "rejected"], rows
    )
    for key in ("duplicates", "contradictions", "longer_is_chosen"):
        reporter.say(f"{key.replace('_', ' ')}: {found[key]}")
    for example in found["examples"]:
        _show(reporter, example)
    if test is not None:
        leaks = found["leaks"]
        reporter.say(
            f"shared with {arguments.test_split}: {leaks['pairs']} pairs, {leaks['prompts']}"
            " prompts"
        )
    emit_json(arguments.json, found)
    return 0


def _show(reporter: Reporter, example: dict[str, Any]) -> None:
    """One record, turn by turn."""
    owner = "" if example["client_id"] is None else f", client {example['client_id']}"
    reporter.say(f"{example['from']}{owner}")
    replies = [(key, example[key]) for key in ("chosen", "rejected")]
    for role, text in [(m["role"], m["content"]) for m in example["turns"]] + replies:
        reporter.say(f"  {role + ':':<10} {harmless(text, 160)}")


def run_convert(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Write what was read in one form."""
    out: Path = arguments.out
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise BadInputError(f"--out {out}: name a .jsonl or a .jsonl.gz file")
    if out.exists():
        raise BadInputError(f"--out {out}: is there already; name a new file")
    source = (
        read_published(
            arguments.published, arguments.source, arguments.split, arguments.score_margin
        )
        if arguments.published
        else read_as_asked(arguments, arguments.source, arguments.split)
    )
    say_notes(reporter, source)
    made, lost = list[dict[str, Any]](), 0
    for pair in source.pairs:
        try:
            made.append((to_record if arguments.to == "trl" else to_transcripts)(pair))
        except RecordError:
            if arguments.on_bad_record != "skip":
                raise
            lost += 1
    raw = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in made).encode()
    write_atomically(out, gzip.compress(raw, mtime=0) if out.name.endswith(".gz") else raw)
    clients = len({p.client_id for p in source.pairs if p.client_id is not None})
    reporter.say(f"{out}: {len(made)} pairs of {clients} clients")
    if lost:
        reporter.say(f"left out: {lost} x what HH-RLHF's form cannot hold")
    return 0


def run_personas(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Write train.jsonl, test.jsonl (the same users), unseen.jsonl and truth.json."""
    given = {k: v for k, v in vars(arguments).items() if k in PersonasConfig.model_fields}
    settings = build_config({"data": {"personas": given}, "method": "fedavg-btl"}).data.personas
    claim(arguments.out)
    if arguments.users < 1 or arguments.unseen_users < 0:
        raise BadInputError("--users must be at least 1, and --unseen-users at least 0")
    seen, unseen = range(arguments.users), range(UNSEEN, UNSEEN + arguments.unseen_users)
    for name, users, split in (
        ("train", seen, "train"),
        ("test", seen, "test"),
        ("unseen", unseen, "test"),
    ):
        lines = [
            json.dumps(to_record(pair), ensure_ascii=False)
            for client in personas(settings, users, arguments.seed, split)
            for pair in client.pairs
        ]  # fmt: skip
        if lines:
            write_atomically(arguments.out / f"{name}.jsonl", ("\n".join(lines) + "\n").encode())
    truth = {
        "attributes": [{"name": n, "minus": low, "plus": high} for n, low, high in ATTRIBUTES],
        "settings": settings.model_dump(),
        "vectors": {
            f"user-{u:04d}": user_vector(settings, u, arguments.seed)[1].tolist()
            for u in (*seen, *unseen)
        },
    }
    write_atomically(arguments.out / "truth.json", (json.dumps(truth, indent=2) + "\n").encode())
    reporter.say(
        f"wrote {arguments.out}: {arguments.users} users, {settings.groups} groups,"
        f" {settings.pairs} pairs each"
    )
    return 0
