"""``fedvpa data inspect`` and ``fedvpa data personas``."""

from __future__ import annotations

import argparse
import json

from fedvpa.config import PersonasConfig, build_config
from fedvpa.console import Reporter, emit_json
from fedvpa.data.inspection import inspect_pairs
from fedvpa.data.personas import ATTRIBUTES, UNSEEN, personas, user_vector
from fedvpa.data.preferences import to_record
from fedvpa.data.reading import PairSet, read_pairs
from fedvpa.errors import BadInputError
from fedvpa.files import claim, write_atomically


def run_inspect(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Print what a source holds."""
    source = read_pairs(arguments.source, arguments.split, arguments.on_bad_record)
    test: PairSet | None = None
    if arguments.test_split:
        test = read_pairs(arguments.source, arguments.test_split, arguments.on_bad_record)
    found = inspect_pairs(source, test)
    reporter.say(
        f"{arguments.source}: {found['pairs']} pairs, {found['prompts']} prompts,"
        f" {found['clients']} client ids"
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
    for reason, count in found["skipped"].items():
        reporter.say(f"skipped: {count} x {reason}")
    for line in source.first_skipped:
        reporter.say(f"  {line}")
    if test is not None:
        leaks = found["leaks"]
        reporter.say(
            f"shared with {arguments.test_split}: {leaks['pairs']} pairs, {leaks['prompts']}"
            " prompts"
        )
    emit_json(arguments.json, found)
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
