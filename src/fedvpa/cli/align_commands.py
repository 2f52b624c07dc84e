"""``fedvpa align`` and ``fedvpa feddpo``: train a policy that z steers, or the baseline."""

from __future__ import annotations

import argparse
import ctypes
import sys

from fedvpa.console import Reporter, emit_json
from fedvpa.policy.align import align
from fedvpa.policy.federated_dpo import feddpo

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2  # malloc.h


def run_align(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Sample, choose, train; print the counts."""
    config = arguments.built
    _keep_freed_memory()
    with reporter.stages() as on_stage:
        result = align(
            arguments.directory, arguments.prompts, arguments.out, config, split=arguments.split,
            resume=arguments.resume,
            on_stage=on_stage,
        )  # fmt: skip
    summary = result.summary
    reporter.say(
        f"{summary['prompts_used']} prompts; left out: {summary['prompts_skipped'] or 'none'}"
    )
    for number, row in enumerate(summary["iterations"]):
        reporter.say(
            f"iteration {number}: pairs {row['pairs']}, {row['dropped_under_margin']} dropped under"
            f" the margin; loss {row['loss']:.3f}, preference accuracy"
            f" {row['preference_accuracy']:.2f}"
        )
    names = ", ".join(summary["preferences"])
    reporter.say(
        f"{result.root}: preferences {names}; {summary['seconds']:.0f} s; next: fedvpa chat"
        f" {result.root} --prefer ..."
    )
    emit_json(arguments.json, summary)
    return 0


def run_feddpo(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Train the baseline."""
    config = arguments.built
    _keep_freed_memory()
    with reporter.stages() as on_stage:
        result = feddpo(
            arguments.directory, arguments.out, config, resume=arguments.resume, on_stage=on_stage
        )
    reporter.say(
        f"{result.root}: {config.rounds} rounds, {result.summary['seconds']:.0f} s; one policy,"
        " preference 'shared'"
    )
    emit_json(arguments.json, result.summary)
    return 0


def _keep_freed_memory() -> None:
    """Have the C library keep large blocks that were freed: training on a CPU otherwise gives
    hundreds of MiB back to the system and asks for them again in every step, and pages that come
    back are zeroed (docs/alignment.md has the figures)."""
    if sys.platform != "linux":
        return
    tune = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if tune is not None:
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**28)):
            tune(option, value)
