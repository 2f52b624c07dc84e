"""``fedvpa privacy plan``: the noise for a target epsilon, before anything is trained."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace

from fedvpa.cli.options import settings_given
from fedvpa.cli.parsers.privacy import what_it_takes
from fedvpa.config import build_config, merged
from fedvpa.console import Reporter, emit_json
from fedvpa.errors import BadInputError
from fedvpa.federated.accounting import noise_for, privacy_of
from fedvpa.methods import DEFAULT


def run_plan(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Find the noise; show what epsilon becomes on the way."""
    given = settings_given(arguments)
    config = build_config(merged(what_it_takes(given.get("method", DEFAULT)), given))
    privacy = privacy_of(config, config.data.made)
    assert privacy is not None
    if privacy.delta >= 1 / config.data.made:
        raise BadInputError(
            f"--delta: {privacy.delta:g} is no privacy for {config.data.made} clients; well"
            " under one over their number"
        )
    rounds, fits = config.federation.rounds, privacy.fits
    noise = noise_for(privacy, rounds, fits, arguments.epsilon)
    planned = replace(privacy, noise=noise)
    marks = sorted({1, *(max(1, rounds * k // 5) for k in range(1, 6))})
    path = [{"round": r, "epsilon": planned.epsilon(r, fits)} for r in marks]
    reporter.table(
        f"{config.data.made} clients, {planned.expected:g} per round on average,"
        f" {fits * planned.fit_releases} sums for fits",
        ["after round", "epsilon"],
        [(str(row["round"]), f"{row['epsilon']:.2f}") for row in path],
    )
    per_mean = noise * planned.clip / planned.expected
    reporter.say(
        f"--privacy.noise {noise:.3g} keeps epsilon within {arguments.epsilon:g} at delta"
        f" {planned.delta:g}"
    )
    reporter.say(
        f"a round's mean update then carries noise of standard deviation {per_mean:.2g} in every"
        " coordinate"
    )
    found = asdict(planned) | {
        "epsilon": arguments.epsilon,
        "rounds": rounds,
        "fits": fits,
        "path": path,
    }
    emit_json(arguments.json, found)
    return 0
