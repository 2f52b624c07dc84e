"""``fedvpa privacy plan``: the noise for a target epsilon, before anything is trained."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

from fedvpa.cli.console import Reporter, add_common, emit_json
from fedvpa.cli.options import add_settings, settings_given
from fedvpa.config import build_config, merged
from fedvpa.errors import BadInputError
from fedvpa.federated.accounting import noise_for, privacy_of

WHAT_IT_TAKES = {
    "prior": {"kind": "components"},
    "prototypes": {"modes": 2},
    "data": {"public": "personas"},
    "privacy": {"enabled": True},
}
"""Settings that privacy needs; those that are given win."""


def register(commands: Any) -> None:
    """Add the commands."""
    privacy = commands.add_parser("privacy", help="plan differential privacy", allow_abbrev=False)
    parts = privacy.add_subparsers(dest="part", required=True, metavar="PART")
    plan = parts.add_parser(
        "plan", help="the noise of a round for a target epsilon", allow_abbrev=False
    )
    plan.add_argument("--epsilon", type=float, required=True, help="target, for the whole run")
    plan.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the plan as JSON")
    add_settings(
        plan, skip=("out", "tracker", "privacy.noise", "privacy.enabled", "privacy.budget")
    )
    add_common(plan)
    plan.set_defaults(run=run_plan)


def run_plan(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Find the noise; show what epsilon becomes on the way."""
    if arguments.epsilon <= 0:
        raise BadInputError("--epsilon: must be above 0")
    config = build_config(merged(WHAT_IT_TAKES, settings_given(arguments)))
    privacy = privacy_of(config, config.data.clients)
    assert privacy is not None
    if privacy.delta >= 1 / config.data.clients:
        raise BadInputError(
            f"--delta: {privacy.delta:g} is no privacy for {config.data.clients} clients; well"
            " under one over their number"
        )
    rounds, fits = config.federation.rounds, privacy.fits
    noise = noise_for(privacy, rounds, fits, arguments.epsilon)
    planned = replace(privacy, noise=noise)
    marks = sorted({1, *(max(1, rounds * k // 5) for k in range(1, 6))})
    path = [{"round": r, "epsilon": planned.epsilon(r, fits)} for r in marks]
    reporter.table(
        f"{config.data.clients} clients, {planned.expected:g} a round on average,"
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
