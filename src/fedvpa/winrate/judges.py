"""Judges of pairs of responses. A judge that fails says so; nothing stands in for it.

| judge | by | its criteria |
|---|---|---|
| `exact` | exact measures | poles of persona attributes |
| `reward` | reward models on another backbone, from pairs that the selector never saw | groups |
| `endpoint` | any OpenAI-compatible endpoint | preferences, described in words |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from fedvpa.errors import RunError
from fedvpa.parts import JUDGES, builder, part
from fedvpa.policy.prompts import Prompt
from fedvpa.records import Progress


class JudgeError(RunError):
    """A judge could not give an answer; what it was to measure is missing."""


@runtime_checkable
class Judge(Protocol):
    """Says which of two responses to a prompt is better by a criterion, usually the name of a
    preference."""

    @property
    def name(self) -> str:
        """Name of the judge in reports."""
        ...

    @property
    def criteria(self) -> list[str]:
        """Criteria that the judge can measure."""
        ...

    @property
    def controls_length(self) -> bool:
        """Whether its win rates are to be given at equal length too."""
        ...

    def compare(
        self, criterion: str, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]
    ) -> list[float]:
        """1 where the first response is better, 0 where the second is, 1/2 for a tie.

        Raises:
            JudgeError: no answer could be had for one of the prompts.
        """
        ...

    def about(self) -> dict[str, Any]:
        """What a reader has to know to trust its figures; the entry ``about`` says it in words."""
        ...


@dataclass(frozen=True)
class Judging:
    """What a builder of judges is told, as ``judging=``.

    Args:
        prompts: what will be judged; a judge that is trained leaves pairs on them out.
        preferences: names of the policy's preferences.
        selector: directory of the run that the policy was made with.
        options: options of judges by name, as `pairs` of the reward judge; values are text.
        say: tells the user a line.
        progress: shows the progress of features.
    """

    prompts: Sequence[Prompt]
    preferences: Sequence[str]
    selector: str
    options: Mapping[str, str] = field(default_factory=dict)
    say: Callable[[str], None] = print
    progress: Progress | None = None


def build_judges(names: Sequence[str], judging: Judging) -> list[Judge]:
    """The judges of these names (entries of `JUDGES`, or ``package.module:NAME``).

    Raises:
        BadInputError: no judge of that name, or options that it cannot use.
    """
    return [builder(part("judge", JUDGES, name))(judging=judging) for name in names]
