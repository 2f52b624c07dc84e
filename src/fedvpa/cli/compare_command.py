"""``fedvpa compare``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedvpa.cli.options import settings_given
from fedvpa.config import flatten
from fedvpa.console import Reporter, emit_json
from fedvpa.errors import BadInputError
from fedvpa.evaluation.statistics import show
from fedvpa.experiment.compare import compare
from fedvpa.experiment.plan import Comparison, TestSettings, comparison, read_plan


def run_compare(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Train and evaluate every row of every setting with every seed, and compare them."""
    given = settings_given(arguments)
    out = Path(given.pop("out", "runs/compare"))
    comparisons = _planned(arguments, given) if arguments.plan else [_one_setting(arguments, given)]
    with reporter.texts() as on_features, reporter.progress("runs") as bar:
        tables = compare(
            comparisons,
            out,
            max(1, arguments.jobs),
            lambda done, total, name: bar.update(done, total, name),
            on_features,
        )
    for table in tables:
        keys = ("seen", "closure_seen", "unseen", "no_context", "other_group", "difference_unseen")
        rows = [
            (r["row"], *(show(r[k]) for k in keys), f"{r['seconds']:.0f}") for r in table["rows"]
        ]
        reporter.table(
            f"{table['setting'] or 'accuracy on targets'}; mean [95 % interval]",
            [
                "",
                "seen",
                "closure",
                "unseen",
                "no context",
                "other group's z",
                f"minus {table['reference']}, unseen",
                "s per run",
            ],
            rows,
        )
    reporter.say(f"{out}/results.csv, {out}/results.md, {out}/report.html")
    emit_json(arguments.json, {"settings": tables})
    return 0


def _planned(arguments: argparse.Namespace, given: dict[str, Any]) -> list[Comparison]:
    if given:
        raise BadInputError(
            f"--plan says what is trained; {', '.join(flatten(given))} would not be read"
        )
    comparisons = read_plan(arguments.plan, arguments.data_root, arguments.quick)
    wanted = [name for name in (arguments.settings or "").split(",") if name]
    unknown = [name for name in wanted if name not in {c.name for c in comparisons}]
    if unknown:
        known = ", ".join(c.name for c in comparisons)
        raise BadInputError(f"--settings: {', '.join(unknown)} not in the plan (known: {known})")
    return [c for c in comparisons if not wanted or c.name in wanted]


def _one_setting(arguments: argparse.Namespace, given: dict[str, Any]) -> Comparison:
    methods = list(dict.fromkeys(m for m in arguments.methods.split(",") if m))
    test = TestSettings(
        source=arguments.test_data, split=arguments.test_split, unseen=arguments.unseen_data,
        clients=arguments.unseen_clients,
        context=arguments.context,
        repeats=arguments.repeats,
    )  # fmt: skip
    seeds = list(dict.fromkeys(int(s) for s in arguments.seeds.split(",")))
    return comparison({m: {} for m in methods}, given, seeds, test)
