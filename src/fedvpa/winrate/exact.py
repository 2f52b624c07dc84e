"""The exact judge: measures of persona attributes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedvpa.data.personas import ATTRIBUTES, measure
from fedvpa.errors import BadInputError
from fedvpa.policy.prompts import Prompt
from fedvpa.winrate.judges import Judging

POLES = {
    pole: (name, sign) for name, low, high in ATTRIBUTES for pole, sign in ((low, -1), (high, 1))
}
"""Pole of a persona attribute to (attribute, sign)."""


@dataclass(frozen=True)
class ExactJudge:
    """By `measure`: the response further towards the pole is the better one. Criteria are poles of
    persona attributes."""

    criteria: list[str]
    name: str = "exact"
    controls_length: bool = False

    def compare(
        self, criterion: str, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]
    ) -> list[float]:
        """See `Judge`."""
        attribute, sign = POLES[criterion]
        gaps = [
            sign * (measure(a)[attribute] - measure(b)[attribute]) for a, b in zip(first, second)
        ]
        return [1.0 if gap > 0 else 0.0 if gap < 0 else 0.5 for gap in gaps]

    def about(self) -> dict[str, Any]:
        """See `Judge`."""
        measures = {c: POLES[c][0] for c in self.criteria}
        shown = ", ".join(f"{criterion} by {name}" for criterion, name in measures.items())
        return {"about": f"Exact measures: {shown}.", "measures": measures}


def build(*, judging: Judging) -> ExactJudge:
    """For those of the policy's preferences that are poles of persona attributes.

    Raises:
        BadInputError: none of them is.
    """
    poles = [name for name in judging.preferences if name in POLES]
    if not poles:
        raise BadInputError(
            f"--exact: none of {', '.join(judging.preferences)} is a persona attribute"
            f" ({', '.join(POLES)})"
        )
    return ExactJudge(poles)
