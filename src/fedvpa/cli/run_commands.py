"""``fedvpa train``, ``evaluate`` and ``compare``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedvpa.cli.console import Reporter, add_common, emit_json, show_interval
from fedvpa.cli.options import add_settings, settings_given
from fedvpa.config import Config, build_config, flatten
from fedvpa.errors import BadInputError
from fedvpa.evaluation.report import render_report
from fedvpa.experiment.compare import compare
from fedvpa.experiment.dataset import TrainingData
from fedvpa.experiment.evaluate import EvaluationSettings, evaluate
from fedvpa.experiment.plan import Comparison, TestSettings, comparison, read_plan
from fedvpa.experiment.run import RunPaths, changed_settings, load_config
from fedvpa.experiment.train import train
from fedvpa.files import write_atomically
from fedvpa.methods import METHODS


def register(commands: Any) -> None:
    """Add the commands."""
    one = commands.add_parser("train", help="train one method", allow_abbrev=False)
    add_settings(one)
    one.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted run (its own settings are used)",
    )
    one.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the history as JSON"
    )
    add_common(one)
    one.set_defaults(run=run_train)

    test = commands.add_parser(
        "evaluate", help="evaluate a run on seen and unseen clients", allow_abbrev=False
    )
    test.add_argument("directory", metavar="RUN")
    _evaluation_flags(test)
    test.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON (default: RUN/eval.json)"
    )
    test.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="where the HTML report goes (default: RUN/report.html)",
    )
    add_common(test)
    test.set_defaults(run=run_evaluate)

    many = commands.add_parser(
        "compare",
        help="methods x settings x seeds, resumable, with paired differences",
        allow_abbrev=False,
    )
    add_settings(many, skip=("method", "seed"))
    many.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="YAML of rows, settings and seeds (see benchmarks/plan.yaml)",
    )
    many.add_argument(
        "--data-root", type=Path, metavar="DIR", help="where the plan's data sources are"
    )
    many.add_argument(
        "--settings", metavar="NAMES", help="only these settings of the plan, comma-separated"
    )
    many.add_argument("--quick", action="store_true", help="the plan's short form")
    many.add_argument(
        "--methods",
        default="fedvpa-gp,fedvpl,fedavg-btl",
        help="comma-separated; the first is the reference",
    )
    many.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated (default: 0,1,2,3,4)")
    many.add_argument(
        "--test-data", metavar="SOURCE", help="evaluation data (default: the training source)"
    )
    many.add_argument("--test-split", metavar="SPLIT", help="evaluation split")
    many.add_argument("--unseen-clients", type=int, default=10)
    many.add_argument("--context", type=int, default=16)
    many.add_argument("--repeats", type=int, default=4)
    many.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    many.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the table as JSON"
    )
    add_common(many)
    many.set_defaults(run=run_compare)


def _evaluation_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="SOURCE", help="evaluation data (default: the run's own source)"
    )
    parser.add_argument("--split", help="only files called SPLIT.*")
    parser.add_argument(
        "--clients", type=int, default=10, help="unseen clients made from it (default: 10)"
    )
    parser.add_argument(
        "--context",
        type=int,
        default=32,
        help="context pairs, at most half of a client's (default: 32)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=4,
        help="random divisions into context and targets (default: 4)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of these divisions (default: 0)")
    parser.add_argument("--on-bad-record", choices=["few", "error", "skip"], default="few")


def run_train(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Train, or resume."""
    given = settings_given(arguments)
    if arguments.resume:
        config = load_config(RunPaths(Path(given.get("out", "runs/default"))))
        changed = [name for name in changed_settings(config, given) if name != "out"]
        if changed:
            raise BadInputError(
                f"--resume: the run has other values for {', '.join(changed)}; leave them out"
            )
        config = config.model_copy(update={"out": given.get("out", config.out)})
    else:
        config = build_config(given)
    reporter.say(_headline(config))

    def on_data(data: TrainingData) -> None:
        pairs = sum(len(c.pairs) for c in data.train)
        reporter.say(
            f"{len(data.train)} clients, {pairs} training pairs,"
            f" {sum(len(c.pairs) for c in data.validation)} for validation"
        )
        for reason, count in data.skipped.items():
            reporter.say(f"skipped: {count} x {reason}")
        if data.first_skipped:
            reporter.say(f"  first: {data.first_skipped[0]}")

    with reporter.texts() as on_features, reporter.progress("rounds") as bar:

        def on_round(done: int, total: int, row: dict[str, Any]) -> None:
            loss = f"loss {row['loss']:.4f}" if "loss" in row else ""
            accuracy = (
                f" validation {row['validation_accuracy']:.3f}"
                if "validation_accuracy" in row
                else ""
            )
            spent = (
                f" epsilon {row['epsilon']:.2f} (delta {config.privacy.delta:g})"
                if "epsilon" in row
                else ""
            )
            bar.update(done, total, loss + accuracy + spent)

        result = train(
            config,
            resume=arguments.resume,
            on_round=on_round,
            on_features=on_features,
            on_data=on_data,
        )
    last = next((row for row in reversed(result.history) if "validation_accuracy" in row), None)
    if last:
        reporter.say(
            f"validation accuracy {last['validation_accuracy']:.3f} after round {last['round']}"
        )
    reporter.say(
        f"{result.root}: done in {result.seconds:.0f} s; next: fedvpa evaluate {result.root} --data"
        " ... --split ..."
    )
    emit_json(
        arguments.json,
        {"run": str(result.root), "seconds": result.seconds, "history": result.history},
    )
    return 0


def _headline(config: Config) -> str:
    p = config.prototypes
    if not config.variational:
        return f"{config.method}, seed {config.seed}, {config.federation.rounds} rounds"
    prior = config.prior.kind + (
        f" with {config.prior.weights} weights" if config.prior.kind == "peers" else ""
    )
    return (
        f"{config.method}, seed {config.seed}, {config.federation.rounds} rounds:"
        f" {config.model.conditioning} reward, {config.model.pooling} pooling, prior {prior},"
        f" prototypes {p.kind}, inference {config.inference.kind}"
    )


def run_evaluate(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Evaluate, print the table, write JSON and HTML."""
    settings = evaluation_settings(arguments)
    with reporter.texts() as progress:
        found = evaluate(arguments.directory, settings, progress)
    results = found.results
    rows = []
    for key in ("own", "worst_group", "prior_mean", "shuffled", "other_group", "flipped"):
        cells = [
            show_interval(part["accuracy"].get(key)) for part in (results, results["seen"]) if part
        ]
        rows.append((key.replace("_", " "), *cells))
    columns = ["accuracy", "unseen clients", *(["seen clients"] if results["seen"] else [])]
    reporter.table(
        f"{results['run']['method']}: target pairs, disjoint from every context", columns, rows
    )
    if "latent" in results:
        ari = results["latent"]["ari"]
        shown = "" if ari is None else f"ARI {ari:.2f}, "
        reporter.say(
            f"latent: {shown}{results['posterior']['active_units']} active units of"
            f" {results['posterior']['dimensions']}"
        )
    root = Path(arguments.directory)
    emit_json(arguments.json or str(root / "eval.json"), results)
    page = render_report(
        results, seen=found.seen, unseen=found.unseen, prototypes=found.prototypes,
        group_names=found.group_names,
        seen_group=found.seen_group, unseen_group=found.unseen_group, probability=found.probability,
    )  # fmt: skip
    report = arguments.report or root / "report.html"
    write_atomically(report, page.encode())
    reporter.say(f"report: {report}")
    return 0


def evaluation_settings(arguments: argparse.Namespace) -> EvaluationSettings:
    """Checked settings of ``evaluate``.

    Raises:
        BadInputError: a number out of range.
    """
    for name, least in (("clients", 1), ("context", 0), ("repeats", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise BadInputError(f"--{name}: at least {least}")
    return EvaluationSettings(
        arguments.data, arguments.split, arguments.clients, arguments.context, arguments.repeats,
        arguments.seed,
        arguments.on_bad_record,
    )  # fmt: skip


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
            (r["row"], *(show_interval(r[k]) for k in keys), f"{r['seconds']:.0f}")
            for r in table["rows"]
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
                "s a run",
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
    for flag in ("quick", "settings", "data_root"):
        if getattr(arguments, flag):
            raise BadInputError(f"--{flag.replace('_', '-')} goes with --plan")
    methods = list(dict.fromkeys(m for m in arguments.methods.split(",") if m))
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods:
        raise BadInputError(
            f"--methods: {', '.join(unknown) or 'none given'} (known: {', '.join(METHODS)})"
        )
    if not all(s.isdigit() for s in arguments.seeds.split(",")):
        raise BadInputError(
            f"--seeds: '{arguments.seeds}' must be whole numbers, separated by commas"
        )
    for name, least in (("unseen_clients", 1), ("context", 0), ("repeats", 1)):
        if getattr(arguments, name) < least:
            raise BadInputError(f"--{name.replace('_', '-')}: at least {least}")
    test = TestSettings(
        source=arguments.test_data, split=arguments.test_split, clients=arguments.unseen_clients,
        context=arguments.context,
        repeats=arguments.repeats,
    )  # fmt: skip
    seeds = list(dict.fromkeys(int(s) for s in arguments.seeds.split(",")))
    return comparison({m: {} for m in methods}, given, seeds, test)
