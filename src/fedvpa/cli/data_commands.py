"""``fedvpa data`` (inspect, personas) and ``fedvpa embed``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fedvpa.cli.console import Reporter, add_common, emit_json
from fedvpa.cli.options import add_settings, settings_given
from fedvpa.config import PersonasConfig, build_config
from fedvpa.data.inspection import inspect_pairs
from fedvpa.data.personas import ATTRIBUTES, UNSEEN, personas, user_vector
from fedvpa.data.preferences import to_record
from fedvpa.data.reading import PairSet, read_pairs
from fedvpa.errors import BadInputError
from fedvpa.experiment.dataset import training_data
from fedvpa.features.cache import FeatureCache
from fedvpa.files import write_atomically


def register(commands: Any) -> None:
    """Add the commands."""
    data = commands.add_parser(
        "data", help="look at preference data, or make some", allow_abbrev=False
    )
    kinds = data.add_subparsers(dest="data_command", required=True, metavar="inspect|personas")

    inspect = kinds.add_parser(
        "inspect", help="counts, lengths, groups, duplicates, leaks", allow_abbrev=False
    )
    inspect.add_argument("source", help="file, folder, or Hub dataset")
    inspect.add_argument("--split", help="only files called SPLIT.*")
    inspect.add_argument(
        "--test-split",
        metavar="SPLIT",
        help="also look for pairs and prompts that this split shares",
    )
    inspect.add_argument("--on-bad-record", choices=["few", "error", "skip"], default="few")
    inspect.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write JSON (to standard output without FILE)",
    )
    add_common(inspect)
    inspect.set_defaults(run=run_inspect)

    make = kinds.add_parser(
        "personas", help="write a personas data set with its truth", allow_abbrev=False
    )
    make.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a directory that does not exist yet"
    )
    make.add_argument(
        "--users", type=int, default=40, help="users in train.jsonl and test.jsonl (default: 40)"
    )
    make.add_argument(
        "--unseen-users", type=int, default=10, help="users of unseen.jsonl (default: 10)"
    )
    for name, info in PersonasConfig.model_fields.items():
        make.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            help=f"{info.description} (default: {info.default})",
        )
    make.add_argument("--seed", type=int, default=0)
    add_common(make)
    make.set_defaults(run=run_personas)

    embed = commands.add_parser(
        "embed", help="compute and cache features ahead of training", allow_abbrev=False
    )
    add_settings(embed, skip=("out", "method", "preset", "tracker"))
    embed.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write JSON (to standard output without FILE)",
    )
    add_common(embed)
    embed.set_defaults(run=run_embed)


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
    if arguments.out.exists():
        raise BadInputError(f"{arguments.out}: exists already; choose another --out")
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


def run_embed(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Fill the feature cache for what `train` would read with the same settings."""
    config = build_config(settings_given(arguments))
    data = training_data(config)
    pairs = [p for client in (*data.train, *data.validation) for p in client.pairs]
    speed = [0.0]
    with reporter.texts() as show:

        def progress(done: int, total: int, tokens_per_second: float) -> None:
            speed[0] = tokens_per_second
            show(done, total, tokens_per_second)

        table = FeatureCache(config.features).pairs(pairs, progress)
    done = {
        "pairs": len(pairs), "texts_computed": table.computed, "width": table.values.shape[-1],
        "backbone": table.backbone, "signature": table.signature,
        "tokens_per_second": speed[0] or None,
    }  # fmt: skip
    reporter.say(
        f"{len(pairs)} pairs by {table.backbone}: {table.computed} texts computed, the rest was"
        " cached"
    )
    emit_json(arguments.json, done)
    return 0
