"""Methods x seeds: every cell trained and evaluated once (what is finished is not done again), then one table."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fedvpa.checkpoint import write_atomically
from fedvpa.config import Config, build_config, settings_for
from fedvpa.errors import BadInputError
from fedvpa.evaluation.comparison import render_comparison
from fedvpa.evaluation.report import render_report
from fedvpa.evaluation.statistics import Interval, interval
from fedvpa.experiment.evaluate import EvaluationSettings, evaluate
from fedvpa.experiment.run import RunPaths, load_config
from fedvpa.experiment.train import train
from fedvpa.models.backbone import Progress

OnCell = Callable[[int, int, str], None]
"""Called with (cells done, cells in all, the last one's name)."""


@dataclass(frozen=True)
class CompareSettings:
    """`given` are the training settings that all methods share; those of the latent go to methods that have one."""

    methods: list[str]
    seeds: list[int]
    given: dict[str, Any]
    out: Path
    test_data: str | None = None
    test_split: str | None = None
    unseen_clients: int = 10
    context: int = 16
    repeats: int = 4
    jobs: int = 1


@dataclass(frozen=True)
class Cell:
    """One run: a method with a seed."""

    config: Config
    evaluation: EvaluationSettings

    @property
    def name(self) -> str:
        """``method-seed0``."""
        return f"{self.config.method}-seed{self.config.seed}"


def compare(settings: CompareSettings, on_cell: OnCell | None = None, on_features: Progress | None = None) -> dict[str, Any]:
    """Run all cells and write results.csv, results.md and report.html into `settings.out`.

    Raises:
        BadInputError: unusable settings or data, or cells of other settings in `settings.out`.
    """
    cells = [_cell(settings, method, seed) for method in settings.methods for seed in settings.seeds]
    todo = [cell for cell in cells if _finished(cell) is None]
    done = len(cells) - len(todo)
    if on_cell is not None and done:
        on_cell(done, len(cells), "finished before")
    for name in _run_all(todo, settings.jobs, on_features):
        done += 1
        if on_cell is not None:
            on_cell(done, len(cells), name)
    found: dict[tuple[str, int], Any] = {(cell.config.method, cell.config.seed): _finished(cell) for cell in cells}
    table = _table(settings, found)
    write_atomically(settings.out / "results.csv", _csv(found).encode())
    write_atomically(settings.out / "results.md", _markdown(table, settings).encode())
    write_atomically(settings.out / "report.html", render_comparison(table, found).encode())
    return table


def _cell(settings: CompareSettings, method: str, seed: int) -> Cell:
    out = str(settings.out / f"{method}-seed{seed}")
    config = build_config(settings_for(method, settings.given), {"method": method, "seed": seed, "out": out})
    return Cell(
        config,
        EvaluationSettings(
            settings.test_data, settings.test_split, settings.unseen_clients, settings.context, settings.repeats, seed,
            config.data.on_bad_record,
        ),
    )  # fmt: skip


def _run_all(cells: list[Cell], jobs: int, on_features: Progress | None) -> Iterable[str]:
    if jobs == 1 or len(cells) < 2:
        for cell in cells:
            yield run_cell(cell, on_features)
        return
    # the first cell fills the feature cache; the others then find it warm instead of computing the same texts twice
    yield run_cell(cells[0], on_features)
    with ProcessPoolExecutor(min(jobs, len(cells) - 1), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_cell, cell) for cell in cells[1:]]
        for future in as_completed(futures):
            yield future.result()


def run_cell(cell: Cell, on_features: Progress | None = None) -> str:
    """Train (or go on), evaluate, and write eval.json last: it marks the cell as finished."""
    paths = RunPaths(Path(cell.config.out))
    start = time.perf_counter()
    train(cell.config, resume=paths.config.is_file(), on_features=on_features)
    trained = time.perf_counter() - start
    found = evaluate(cell.config.out, cell.evaluation, on_features)
    page = render_report(
        found.results, seen=found.seen, unseen=found.unseen, prototypes=found.prototypes, group_names=found.group_names,
        seen_group=found.seen_group, unseen_group=found.unseen_group, probability=found.probability,
    )  # fmt: skip
    write_atomically(paths.root / "report.html", page.encode())
    found.results["seconds"] = trained
    found.results["evaluation"] = repr(cell.evaluation)
    paths.write_json("eval.json", found.results)
    return cell.name


def _finished(cell: Cell) -> dict[str, Any] | None:
    """Results of a finished cell; None if it has still to run.

    Raises:
        BadInputError: the directory holds a run of other settings.
    """
    paths = RunPaths(Path(cell.config.out))
    if paths.config.is_file() and load_config(paths) != cell.config:
        raise BadInputError(f"{paths.root}: holds a run with other settings; choose another --out, or remove it")
    file = paths.root / "eval.json"
    if not file.is_file():
        return None
    results: dict[str, Any] = json.loads(file.read_text())
    return results if results.get("evaluation") == repr(cell.evaluation) else None


def _table(settings: CompareSettings, found: dict[tuple[str, int], Any]) -> dict[str, Any]:
    """A row a method; its difference from the reference method is paired by client."""

    def by_seed(method: str, part: str | None) -> list[list[float]]:
        """Accuracy of every client, for every seed."""
        every = [found[method, seed] if part is None else found[method, seed][part] for seed in settings.seeds]
        return [[math.nan if v is None else v for v in r["per_client_accuracy"]] if r else [] for r in every]

    reference = settings.methods[0]
    rows = []
    for method in settings.methods:
        every = [found[method, seed] for seed in settings.seeds]
        difference = [
            [a - b for a, b in zip(one, other)]
            for one, other in zip(by_seed(method, None), by_seed(reference, None))
        ]  # fmt: skip
        rows.append(
            {
                "method": method,
                "seen": _over_seeds(by_seed(method, "seen")),
                "unseen": _over_seeds(by_seed(method, None)),
                "worst_group": interval([r["accuracy"]["worst_group"]["mean"] for r in every]),
                "other_group": interval(
                    [r["accuracy"]["other_group"]["mean"] for r in every if "other_group" in r["accuracy"]]
                ),
                "difference": None if method == reference else _over_seeds(difference),
                "seconds": sum(r["seconds"] for r in every) / len(every),
            }
        )
    return {"reference": reference, "seeds": settings.seeds, "context": settings.context, "rows": rows}


def _over_seeds(values: list[list[float]]) -> Interval:
    """Interval over seeds of the clients' means: clients of one seed share a model, so they are not independent. With one
    seed there is nothing but the clients, and the interval is over them."""
    if len(values) == 1:
        return interval(values[0])
    return interval([interval(clients)["mean"] for clients in values])


def _csv(found: dict[tuple[str, int], Any]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["method", "seed", "unseen_own", "unseen_worst_group", "unseen_other_group", "unseen_prior_mean", "seen_own",
         "ari", "ece", "seconds"]
    )  # fmt: skip
    for (method, seed), r in found.items():
        a = r["accuracy"]
        values = [
            a["own"]["mean"], a["worst_group"]["mean"], a.get("other_group", {}).get("mean"), a["prior_mean"]["mean"],
            r["seen"]["accuracy"]["own"]["mean"] if r["seen"] else None, r.get("latent", {}).get("ari"), r["ece"]["own"],
            r["seconds"],
        ]  # fmt: skip
        writer.writerow([method, seed, *("" if v is None else f"{v:.4f}" for v in values)])
    return out.getvalue()


def _markdown(table: dict[str, Any], settings: CompareSettings) -> str:
    def cell(v: dict[str, Any] | None) -> str:
        return "-" if v is None or not v["n"] else f"{v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]"

    lines = [
        f"Accuracy on target pairs, disjoint from the context of at most {settings.context} pairs; seeds "
        f"{', '.join(map(str, settings.seeds))}; 95 % intervals over seeds (with one seed: over clients).",
        "",
        f"| method | seen | unseen | worst group | other group's z | difference from {table['reference']}, paired |",
        "|---|---|---|---|---|---|",
    ]
    for r in table["rows"]:
        cells = (r["seen"], r["unseen"], r["worst_group"], r["other_group"], r["difference"])
        lines.append(f"| {r['method']} | " + " | ".join(cell(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"
