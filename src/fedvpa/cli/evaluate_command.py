"""``fedvpa evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedvpa.cli.options import columns_given
from fedvpa.console import Reporter, emit_json
from fedvpa.evaluation.report import render_report
from fedvpa.evaluation.statistics import show, told_apart
from fedvpa.evaluation.verdict import found_structure
from fedvpa.experiment.evaluate import evaluate
from fedvpa.experiment.subjects import EvaluationSettings
from fedvpa.files import write_atomically


def run_evaluate(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Evaluate, print the table, write JSON and HTML."""
    settings = evaluation_settings(arguments)
    with reporter.texts() as progress:
        found = evaluate(arguments.directory, settings, progress)
    results = found.results
    for note in results["data"]["notes"]:
        reporter.say(note)
    parts = {"unseen clients": results} if results["accuracy"] else {}
    if results["seen"]:
        by = " (pairs dealt by group)" * (results["data"]["held_out_pairs_by"] == "group")
        parts[f"seen clients{by}"] = results["seen"]
    rows = []
    for key in told_apart(*(part["accuracy"] for part in parts.values())):
        cells = [show(part["accuracy"].get(key)) for part in parts.values()]
        rows.append((key.replace("_", " "), *cells))
    columns = ["accuracy", *parts]
    reporter.table(
        f"{results['run']['method']}: target pairs, disjoint from every context", columns, rows
    )
    for said in results["verdict"].values():
        reporter.say(said["sentence"])
    if results["structure"]:
        reporter.say(found_structure(results["structure"]))
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
    """Settings of ``evaluate``."""
    return EvaluationSettings(
        arguments.data, arguments.split, arguments.clients, arguments.context, arguments.repeats,
        arguments.seed,
        arguments.on_bad_record, arguments.unseen,
        tuple(sorted(columns_given(arguments).items())), arguments.content,
    )  # fmt: skip
