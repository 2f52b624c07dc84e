"""Flags of ``fedvpa privacy plan``."""

from __future__ import annotations

import argparse
from typing import Any

from fedvpa.cli.options import Asked, add_common, add_json, add_settings
from fedvpa.config import leaf_settings, settings_for
from fedvpa.errors import BadInputError

READ = ("method", "data.clients", "federation.rounds", "federation.cohort", "population.width",
        "prior.kind", "prototypes.kind", "prototypes.modes")  # fmt: skip
"""Settings that decide what a run releases, and how often, beside those of privacy."""

WHAT_IT_TAKES: dict[str, Any] = {
    "prior": {"kind": "components"},
    "prototypes": {"modes": 2},
    "data": {"public": "personas"},
    "privacy": {"enabled": True},
}
"""Settings that privacy needs, of one method or another; those that are given win."""


def what_it_takes(method: str) -> dict[str, Any]:
    """Settings that privacy needs, with this method."""
    return {"method": method} | settings_for(method, WHAT_IT_TAKES)


def plan(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa privacy plan``."""
    parser.add_argument("--epsilon", type=float, required=True, help="target, for the whole run")
    skip = ("out", "tracker", "privacy.noise", "privacy.enabled", "privacy.budget")
    shown = [name for name in leaf_settings() if name.startswith("privacy.") or name in READ]
    given = what_it_takes(asked.method)
    add_settings(parser, asked, shown, skip=skip, basic=shown, given=given)
    add_json(parser, "the plan")
    add_common(parser)


def check_plan(arguments: argparse.Namespace) -> None:
    """A target that cannot be."""
    if arguments.epsilon <= 0:
        raise BadInputError("--epsilon: must be above 0")
