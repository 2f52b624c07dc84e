"""A command's own source of pairs: read as its flags ask, and what was understood of it."""

from __future__ import annotations

import argparse

from fedvpa.cli.options import columns_given
from fedvpa.console import Reporter
from fedvpa.data.reading import PairSet, read_pairs


def read_as_asked(arguments: argparse.Namespace, source: str, split: str | None = None) -> PairSet:
    """The pairs of a source, read as `fedvpa.cli.options.add_reading` asks.

    Raises:
        BadInputError: it cannot be read, or holds no pairs.
    """
    return read_pairs(
        source, split, arguments.on_bad_record, columns=columns_given(arguments),
        score_margin=arguments.score_margin,
    )  # fmt: skip


def say_notes(reporter: Reporter, source: PairSet) -> None:
    """How a source was understood, and what was left out of it."""
    for note in source.notes:
        reporter.say(note)
    for reason, count in source.skipped.items():
        reporter.say(f"skipped: {count} x {reason}")
    for line in source.first_skipped[:3]:
        reporter.say(f"  {line}")
