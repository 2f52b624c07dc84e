"""``fedvpa train``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedvpa.config import Config, settings_read
from fedvpa.console import Reporter, emit_json
from fedvpa.errors import BadInputError
from fedvpa.experiment.dataset import TrainingData, described
from fedvpa.experiment.run import RunPaths, changed_settings, load_config
from fedvpa.experiment.train import told, train


def run_train(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Train, or resume."""
    config = _resumed(arguments.given) if arguments.resume else arguments.built
    reporter.say(_headline(config))

    def on_data(data: TrainingData) -> None:
        for line in described(config, data):
            reporter.say(line)
        for reason, count in data.skipped.items():
            reporter.say(f"skipped: {count} x {reason}")
        if data.first_skipped:
            reporter.say(f"  first: {data.first_skipped[0]}")

    with reporter.texts() as on_features, reporter.progress("rounds") as bar:

        def on_round(done: int, total: int, row: dict[str, Any]) -> None:
            bar.update(done, total, told(row, config.privacy.delta))

        result = train(
            config,
            resume=arguments.resume,
            on_round=on_round,
            on_features=on_features,
            on_data=on_data,
        )
    last = next((row for row in reversed(result.history) if "validation_accuracy" in row), None)
    if last:
        low, high = last.get("validation_low"), last.get("validation_high")
        within = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
        over = f", {last['validation_clients']:.0f} clients" if "validation_clients" in last else ""
        reporter.say(
            f"validation accuracy {last['validation_accuracy']:.3f}{within} after round"
            f" {last['round']} (95 %{over})"
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


def _resumed(given: dict[str, Any]) -> Config:
    config = load_config(RunPaths(Path(given.get("out", "runs/default"))))
    changed = [name for name in changed_settings(config, given) if name != "out"]
    if changed:
        raise BadInputError(
            f"--resume: the run has other values for {', '.join(changed)}; leave them out"
        )
    return config.model_copy(update={"out": given.get("out", config.out)})


def _headline(config: Config) -> str:
    p = config.prototypes
    if not config.variational:
        return f"{config.method}, seed {config.seed}, {config.federation.rounds} rounds"
    if "population.structure" in settings_read(config):
        q = config.population
        searched = ", ".join(
            f"{name} {'searched' if value == 'auto' else value}"
            for name, value in (
                ("structure", q.structure), ("order", q.order), ("penalty", q.ridge),
                ("width", q.width),
            )
        )  # fmt: skip
        return f"{config.method}, seed {config.seed}, {config.federation.rounds} rounds: {searched}"
    prior = config.prior.kind + (
        f" with {config.prior.weights} weights" if config.prior.kind == "peers" else ""
    )
    return (
        f"{config.method}, seed {config.seed}, {config.federation.rounds} rounds:"
        f" {config.model.conditioning} reward, {config.model.pooling} pooling, prior {prior},"
        f" prototypes {p.kind}, inference {config.inference.kind}"
    )
