"""What the commands print: rich on a terminal, plain lines in a log, nothing but JSON on standard
output with ``--json -``."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fedvpa.files import plain_json, write_atomically
from fedvpa.foreign import OneLine, harmless, harmless_lines
from fedvpa.records import Progress as TextProgress
from fedvpa.telling import listening

NOTICED = 2.0
"""Seconds after which a step is worth a line in a log."""


class Reporter:
    """Progress and tables go to standard error, results to standard output."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, soft_wrap=True, highlight=False)
        if not self.console.is_terminal:
            self.console.width = 160  # a log has no width of its own to fold tables to

    def say(self, text: str) -> None:
        """One line, unless quiet."""
        self.console.print(harmless_lines(text), markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is text, the others numbers."""
        heading = Text(harmless(title), style="bold")
        table = Table(title=heading, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(Text(harmless(column)), justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*(Text(harmless(cell)) for cell in row))
        self.console.print(table)

    @contextmanager
    def progress(self, description: str) -> Iterator[_Bar]:
        """A bar with an estimate of the time left; in a log, a line every half minute."""
        bar = _Bar(self.console, description)
        try:
            yield bar
        finally:
            bar.close()

    @contextmanager
    def texts(self, description: str = "features") -> Iterator[TextProgress]:
        """Progress of a backbone, with tokens per second."""
        with self.progress(description) as bar:
            yield lambda done, total, speed: bar.update(done, total, f"{speed:,.0f} tokens/s")

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Shows what long steps tell of themselves (`fedvpa.telling`); in a log, those that took
        two seconds."""
        bars: dict[str, _Bar] = {}

        def on_step(step: str, done: int, total: int) -> None:
            if step not in bars:
                bars[step] = _Bar(self.console, step, least=NOTICED)
            bars[step].update(done, total)
            if done >= total:
                bars.pop(step).close()

        try:
            with listening(on_step):
                yield
        finally:
            for bar in bars.values():
                bar.close()

    @contextmanager
    def stages(self) -> Iterator[Callable[[str, int, int, str], None]]:
        """Bars one after the other: a function of (stage, done, in all, a note)."""
        with ExitStack() as bars:
            shown: dict[str, _Bar] = {}

            def on_stage(stage: str, done: int, total: int, note: str) -> None:
                if stage not in shown:
                    bars.close()
                    shown[stage] = bars.enter_context(self.progress(stage))
                shown[stage].update(done, total, note)

            yield on_stage


class _Bar:
    def __init__(self, console: Console, description: str, least: float = 0.0) -> None:
        self._console, self._description, self._least = console, description, least
        self._begun = time.monotonic()
        self._progress: Progress | None = None
        self._task: Any = None
        self._last = time.monotonic()

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show progress; the bar appears with the first call."""
        if self._console.is_terminal:
            if self._progress is None:
                self._progress = Progress(
                    # a name is no markup
                    TextColumn("{task.description}", markup=False), BarColumn(),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
                    console=self._console,
                )  # fmt: skip
                self._progress.start()
                self._task = self._progress.add_task(
                    harmless(self._description), total=total, note=""
                )
            self._progress.update(self._task, completed=done, total=total, note=harmless(note))
        elif (done == total or time.monotonic() - self._last > 30) and (
            time.monotonic() - self._begun >= self._least
        ):
            self._last = time.monotonic()
            line = harmless(f"{self._description}: {done}/{total} {note}")
            self._console.print(line, markup=False)

    def close(self) -> None:
        """Take the bar down."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def emit_json(target: str | None, content: Any) -> None:
    """Write JSON to a file, or to standard output for ``-``; NaN becomes null, so that every reader
    can read it.

    Raises:
        OSError: the file cannot be written.
    """
    if target is None:
        return
    if target == "-":
        sys.stdout.write(plain_json(content).decode())
    else:
        write_atomically(Path(target), plain_json(content))


def configure_logging(quiet: bool, debug: bool) -> None:
    """Our log lines to standard error; the libraries' progress bars and advice off."""
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(OneLine("%(message)s"))
    lines.setLevel(logging.ERROR if quiet else logging.NOTSET)
    logging.basicConfig(
        handlers=[lines],
        level=logging.DEBUG if debug else logging.ERROR if quiet else logging.WARNING,
    )
    logging.getLogger("fedvpa").setLevel(
        logging.DEBUG if debug else logging.ERROR if quiet else logging.INFO
    )
    # between libraries, not the user's
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # read when transformers is imported, which not every command does
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
