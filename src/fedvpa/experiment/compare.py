"""Rows x settings x seeds: every cell trained and evaluated once (what is finished is not done
again), then the tables."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fedvpa.config import Config, build_config
from fedvpa.errors import BadInputError, FedvpaError, RunError
from fedvpa.evaluation import plots
from fedvpa.evaluation.comparison import Result, as_csv, as_markdown, compared, render_comparison
from fedvpa.evaluation.report import render_report
from fedvpa.experiment.dataset import training_data
from fedvpa.experiment.evaluate import evaluate
from fedvpa.experiment.plan import Comparison
from fedvpa.experiment.run import RunPaths, load_config
from fedvpa.experiment.subjects import EvaluationSettings, people_of
from fedvpa.experiment.train import train
from fedvpa.files import file_name, write_atomically
from fedvpa.records import Progress
from fedvpa.telling import tell

OnCell = Callable[[int, int, str], None]
"""Called with (cells done, cells in all, the last one's name)."""


@dataclass(frozen=True)
class Cell:
    """One run: a row of a setting, with a seed. `shown` asks for its report and latent map."""

    setting: str
    row: str
    config: Config
    evaluation: EvaluationSettings
    shown: bool

    @property
    def name(self) -> str:
        """``setting/row-seed0``."""
        return str(_place(self.setting, self.row, self.config.seed))

    @property
    def reads(self) -> tuple[str | None, ...]:
        """Settings that decide which texts have to be encoded."""
        data = self.config.data
        return (
            data.source,
            data.split,
            self.evaluation.data,
            self.evaluation.split,
            self.evaluation.unseen,
            self.config.features.model_dump_json(),
        )


def compare(
    comparisons: Sequence[Comparison], out: Path, jobs: int = 1, on_cell: OnCell | None = None,
    on_features: Progress | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run all cells and write results.csv, results.md and report.html into `out`.

    Returns a table per setting.

    Raises:
        BadInputError: unusable settings or data, or cells of other settings in `out`.
        RunError: some runs failed; the tables hold the others, and running again tries the failed
            ones once more.
    """
    cells = [cell for setting in comparisons for cell in _cells(setting, out)]
    todo = [cell for cell in cells if _finished(cell) is None]
    _check(todo)
    done, failed = len(cells) - len(todo), dict[str, str]()
    if on_cell is not None and done:
        on_cell(done, len(cells), "finished before")
    for cell, error in _run_all(todo, jobs, on_features):
        done += 1
        if error is not None:
            failed[cell.name] = str(error)
        if on_cell is not None:
            on_cell(done, len(cells), cell.name)
    tables = _written(comparisons, cells, out)
    if failed:
        shown = "; ".join(f"{name}: {why}" for name, why in list(failed.items())[:3])
        raise RunError(
            f"{len(failed)} of {len(cells)} runs failed ({shown}); {out}/results.md holds the"
            " others"
        )
    return tables


def _check(cells: Sequence[Cell]) -> None:
    """Read and divide all data that the runs will need, before any of them is trained.

    Raises:
        BadInputError: some of it is unusable, with the run that it is for.
    """
    known = set[str]()
    for done, cell in enumerate(cells):
        tell("reading the data of all runs", done, len(cells))
        asked = f"{cell.config.data.model_dump_json()}|{cell.evaluation}|{cell.config.seed}"
        if asked in known:
            continue
        known.add(asked)
        try:
            data = training_data(cell.config)
            people_of(cell.config, cell.evaluation, data.train, {c.name for c in data.train})
        except BadInputError as error:
            raise BadInputError(f"{cell.name}: {error}") from error
    tell("reading the data of all runs", len(cells), len(cells))


def _written(
    comparisons: Sequence[Comparison], cells: Sequence[Cell], out: Path
) -> list[dict[str, Any]]:
    """The tables of what is finished, and their files."""
    results = [
        Result(
            cell.setting,
            cell.row,
            cell.config.method,
            cell.config.seed,
            found,
            cell.name if cell.shown else None,
        )
        for cell in cells
        if (found := _finished(cell)) is not None
    ]
    tables = [
        compared(
            setting.name,
            setting.about,
            [r for r in results if r.setting == setting.name],
            list(setting.rows),
        )
        for setting in comparisons
        if any(r.setting == setting.name for r in results)
    ]
    for table in tables:
        table["context"] = next(s.test.context for s in comparisons if s.name == table["setting"])
    write_atomically(out / "results.csv", as_csv(results).encode())
    write_atomically(out / "results.md", as_markdown(tables).encode())
    maps = {
        cell.name: file.read_text()
        for cell in cells
        if cell.shown and (file := _latent_map(cell)).is_file()
    }
    write_atomically(out / "report.html", render_comparison(tables, results, maps).encode())
    return tables


def _cells(setting: Comparison, out: Path) -> Iterator[Cell]:
    for label, given in setting.rows.items():
        for seed in setting.seeds:
            place = out / _place(setting.name, label, seed)
            config = build_config(given, {"seed": seed, "out": str(place)})
            t = setting.test
            evaluation = EvaluationSettings(
                t.source, t.split, t.clients, t.context, t.repeats, seed, config.data.on_bad_record,
                t.unseen,
            )  # fmt: skip
            yield Cell(setting.name, label, config, evaluation, seed == setting.seeds[0])


def _place(setting: str, row: str, seed: int) -> Path:
    """Where a cell is, within the directory of the comparison; its true name is in its
    configuration, and in the tables."""
    return Path(file_name(setting) if setting else "") / f"{file_name(row)}-seed{seed}"


def _run_all(
    cells: list[Cell], jobs: int, on_features: Progress | None
) -> Iterator[tuple[Cell, FedvpaError | None]]:
    if jobs == 1 or len(cells) < 2:
        for cell in cells:
            yield cell, _attempt(cell, on_features)
        return
    # the first cell that reads some texts fills the feature cache; the others then find it warm
    first = {cell.reads: cell for cell in reversed(cells)}
    waiting = [cell for cell in cells if cell not in first.values()]
    context = get_context("spawn")
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        running: dict[Future[FedvpaError | None], Cell] = {
            pool.submit(_attempt, cell): cell for cell in first.values()
        }
        try:
            while running:
                ready, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    cell = running.pop(future)
                    if cell in first.values():
                        after = [c for c in waiting if c.reads == cell.reads]
                        running |= {pool.submit(_attempt, c): c for c in after}
                    yield cell, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _attempt(cell: Cell, on_features: Progress | None = None) -> FedvpaError | None:
    """Run a cell; an error that a run may well end with is returned, so that one of hundreds
    does not lose the rest."""
    try:
        run_cell(cell, on_features)
    except RunError as error:
        return error
    return None


def run_cell(cell: Cell, on_features: Progress | None = None) -> None:
    """Train (or go on), evaluate, and write eval.json last: it marks the cell as finished."""
    paths = RunPaths(Path(cell.config.out))
    start = time.perf_counter()
    train(cell.config, resume=paths.config.is_file(), on_features=on_features)
    trained = time.perf_counter() - start
    found = evaluate(cell.config.out, cell.evaluation, on_features)
    if cell.shown:
        page = render_report(
            found.results, seen=found.seen, unseen=found.unseen, prototypes=found.prototypes,
            group_names=found.group_names,
            seen_group=found.seen_group, unseen_group=found.unseen_group,
            probability=found.probability,
        )  # fmt: skip
        write_atomically(paths.root / "report.html", page.encode())
        if found.seen is not None:
            figure = plots.latent_map(
                found.seen,
                found.unseen,
                found.prototypes,
                found.seen_group,
                found.unseen_group,
                found.group_names,
            )
            write_atomically(_latent_map(cell), plots.svg(figure).encode())
    found.results["seconds"] = trained
    found.results["evaluation"] = repr(cell.evaluation)
    paths.write_json("eval.json", found.results)


def _latent_map(cell: Cell) -> Path:
    return Path(cell.config.out) / "latent.svg"


def _finished(cell: Cell) -> dict[str, Any] | None:
    """Results of a finished cell; None if it has still to run.

    Raises:
        BadInputError: the directory holds per run of other settings.
    """
    paths = RunPaths(Path(cell.config.out))
    if paths.config.is_file() and load_config(paths) != cell.config:
        raise BadInputError(
            f"{paths.root}: holds per run with other settings; choose another --out, or remove it"
        )
    file = paths.root / "eval.json"
    if not file.is_file():
        return None
    results: dict[str, Any] = json.loads(file.read_text())
    return results if results.get("evaluation") == repr(cell.evaluation) else None
