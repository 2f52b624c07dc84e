"""Flags of ``fedvpa train``, ``evaluate`` and ``compare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedvpa.cli.options import (
    Asked,
    add_common,
    add_json,
    add_reading,
    add_settings,
    seed,
    settings_given,
)
from fedvpa.config import build_config, leaf_settings, settings_readable
from fedvpa.errors import BadInputError
from fedvpa.methods import METHODS


def train(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa train``."""
    parser.add_argument(
        "--resume", action="store_true",
        help="continue an interrupted run (its own settings are used)",
    )  # fmt: skip
    add_settings(parser, asked, settings_readable(asked.method))
    add_json(parser, "the history")
    add_common(parser)


def check_train(arguments: argparse.Namespace) -> None:
    """Settings that cannot be used are refused before anything is loaded."""
    given = settings_given(arguments)
    arguments.given = given
    arguments.built = None if arguments.resume else build_config(given)


def evaluate(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa evaluate``."""
    parser.add_argument("directory", metavar="RUN")
    parser.add_argument(
        "--data", metavar="SOURCE", help="evaluation data (default: the run's own source)"
    )
    parser.add_argument("--split", help="only files called SPLIT.*")
    parser.add_argument(
        "--unseen", metavar="SOURCE", help="other users, who were not trained on (default: --data)"
    )
    parser.add_argument(
        "--clients", type=int, default=0,
        help="unseen clients (default: every new id; 10 where there are no ids)",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=int, default=32,
        help="context pairs, at most half of a client's (default: 32)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, default=4,
        help="random divisions into context and targets (default: 4)",
    )  # fmt: skip
    parser.add_argument(
        "--content", choices=("new", "repeated"),
        help="new: context and targets share no response (default: the run's own)",
    )  # fmt: skip
    parser.add_argument("--seed", type=seed, default=0, help="seed of these divisions (default: 0)")
    add_reading(parser, scores=False)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON (default: RUN/eval.json)"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE",
        help="where the HTML report goes (default: RUN/report.html)",
    )  # fmt: skip
    add_common(parser)


def check_evaluate(arguments: argparse.Namespace) -> None:
    """A number out of range is refused before anything is loaded."""
    _at_least(arguments, clients=0, context=0, repeats=1, seed=0)


def compare(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa compare``."""
    many = parser
    many.add_argument(
        "--methods", default="fedvpa-gp,fedvpl,fedavg-btl",
        help="comma-separated; the first is the reference (default: fedvpa-gp,fedvpl,fedavg-btl)",
    )  # fmt: skip
    many.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated (default: 0,1,2,3,4)")
    many.add_argument(
        "--test-data", metavar="SOURCE", help="evaluation data (default: the training source)"
    )
    many.add_argument("--test-split", metavar="SPLIT", help="evaluation split")
    many.add_argument(
        "--unseen-data", metavar="SOURCE",
        help="other users, who are not trained on (default: the evaluation data)",
    )  # fmt: skip
    many.add_argument(
        "--unseen-clients", type=int, default=0,
        help="clients to evaluate on (default: every new id; 10 where there are no ids)",
    )  # fmt: skip
    many.add_argument("--context", type=int, default=16, help="context pairs (default: 16)")
    many.add_argument(
        "--repeats", type=int, default=4, help="divisions into context and targets (default: 4)"
    )
    many.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    plan = many.add_argument_group("a plan of many settings")
    plan.add_argument(
        "--plan", type=Path, metavar="FILE",
        help="YAML of rows, settings and seeds (see benchmarks/plan.yaml)",
    )  # fmt: skip
    plan.add_argument(
        "--data-root", type=Path, metavar="DIR", help="where the plan's data sources are"
    )
    plan.add_argument(
        "--settings", metavar="NAMES", help="only these settings of the plan, comma-separated"
    )
    plan.add_argument("--quick", action="store_true", help="the plan's short form")
    readable = {name for method in METHODS for name in settings_readable(method)}
    shown = [name for name in leaf_settings() if name in readable]
    add_settings(many, asked, shown, skip=("method", "seed"), given={"out": "runs/compare"})
    add_json(many, "the table")
    add_common(many)


def check_compare(arguments: argparse.Namespace) -> None:
    """Flags that cannot be used are refused before anything is loaded."""
    if arguments.plan:
        return
    for flag in ("quick", "settings", "data_root"):
        if getattr(arguments, flag):
            raise BadInputError(f"--{flag.replace('_', '-')} goes with --plan")
    methods = [m for m in arguments.methods.split(",") if m]
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods:
        raise BadInputError(
            f"--methods: {', '.join(unknown) or 'none given'} (known: {', '.join(METHODS)})"
        )
    try:
        for one in arguments.seeds.split(","):
            seed(one)
    except argparse.ArgumentTypeError as error:
        raise BadInputError(f"--seeds: {error}; separate them by commas") from error
    _at_least(arguments, unseen_clients=0, context=0, repeats=1)


def _at_least(arguments: argparse.Namespace, **least: int) -> None:
    for name, number in least.items():
        if getattr(arguments, name) < number:
            raise BadInputError(f"--{name.replace('_', '-')}: at least {number}")
