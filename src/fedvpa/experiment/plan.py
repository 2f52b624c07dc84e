"""What is to be compared: rows (a method with settings), settings (data and evaluation), seeds;
read from a YAML plan.

```yaml
seeds: [0, 1, 2]
tuned: tuned.yaml                 # optional: settings of each method (but for presets)
rows:
  fedvpa-gp: {}                   # the method is the row's name unless `method` says otherwise
  no anchors: {method: fedvpl+mix}
settings:
  hh-40:
    about: 40 clients
    train: {data: {source: hh_rlhf/human, split: train, clients: 40}}
    test: {split: test, clients: 10, context: 16}
    rows: [fedvpa-gp, no anchors] # the first is the reference of paired differences
quick: {seeds: [0], train: {federation: {rounds: 20}}, settings: [hh-40]}
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from fedvpa.config import Section, build_config, explain, merged, read_yaml, settings_for
from fedvpa.errors import BadInputError
from fedvpa.methods import METHODS


class TestSettings(Section):
    """Evaluation data and how much of it; `source` None stands for the training source, `unseen`
    for another source of unseen users, `clients` 0 for all of its ids."""

    source: str | None = None
    split: str | None = None
    unseen: str | None = None
    clients: Annotated[int, Field(ge=0)] = 0
    context: Annotated[int, Field(ge=0)] = 16
    repeats: Annotated[int, Field(ge=1)] = 4


class PlannedSetting(Section):
    """One entry of `settings`."""

    about: str = ""
    train: dict[str, Any] = Field(default_factory=dict)
    test: TestSettings = TestSettings()
    rows: Annotated[list[str], Field(min_length=1)]
    seeds: list[int] | None = None


class Quick(Section):
    """Settings of the short form of a plan, ``--quick``."""

    seeds: list[int] | None = None
    train: dict[str, Any] = Field(default_factory=dict)
    settings: list[str] | None = None
    rows: list[str] | None = None


class PlanFile(Section):
    """A plan as written."""

    seeds: Annotated[list[int], Field(min_length=1)]
    tuned: str | None = None
    rows: dict[str, dict[str, Any]]
    settings: Annotated[dict[str, PlannedSetting], Field(min_length=1)]
    quick: Quick = Quick()


@dataclass(frozen=True)
class Comparison:
    """One setting, ready to run: `rows` maps a label to all of its training settings but seed and
    directory."""

    name: str
    about: str
    rows: dict[str, dict[str, Any]]
    seeds: list[int]
    test: TestSettings


def comparison(
    rows: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any], seeds: list[int],
    test: TestSettings, name: str = "",
    about: str = "",
) -> Comparison:  # fmt: skip
    """Rows over shared settings `given`; those of the latent go to methods that have one. A row's
    own settings win.

    Raises:
        BadInputError: an unknown method, or settings that do not make a configuration.
    """
    complete = {}
    for label, own in rows.items():
        method = str(own.get("method", label))
        if method not in METHODS:
            raise BadInputError(
                f"row '{label}': unknown method '{method}' (known: {', '.join(METHODS)})"
            )
        preset = str(own.get("preset", "default"))
        complete[label] = merged(settings_for(method, given, preset), {**own, "method": method})
        build_config(complete[label])
    return Comparison(name, about, complete, seeds, test)


def read_plan(path: Path, data_root: Path | None = None, quick: bool = False) -> list[Comparison]:
    """Read and check a plan; relative data sources are looked up in `data_root`.

    Raises:
        BadInputError: unreadable, unknown names in it, or settings that do not make a
            configuration.
    """
    try:
        plan = PlanFile.model_validate(read_yaml(path))
    except ValidationError as error:
        raise BadInputError(
            f"{path}: " + "; ".join(explain(e, PlanFile) for e in error.errors())
        ) from error
    tuned = read_yaml(path.parent / plan.tuned) if plan.tuned else {}
    chosen = (
        plan.quick.settings if quick and plan.quick.settings is not None else list(plan.settings)
    )
    unknown = [name for name in chosen if name not in plan.settings]
    if unknown:
        raise BadInputError(
            f"{path}: quick.settings names {', '.join(unknown)}, which settings does not hold"
        )
    return [_planned(plan, name, tuned, path, data_root, quick) for name in chosen]


def _planned(
    plan: PlanFile,
    name: str,
    tuned: Mapping[str, Any],
    path: Path,
    data_root: Path | None,
    quick: bool,
) -> Comparison:
    setting = plan.settings[name]
    labels = [
        r for r in setting.rows if not quick or plan.quick.rows is None or r in plan.quick.rows
    ]
    unknown = [label for label in labels if label not in plan.rows]
    if unknown:
        raise BadInputError(
            f"{path}: settings.{name} asks for row {', '.join(unknown)}, which rows does not hold"
        )
    rows = {}
    for label in labels:
        own = plan.rows[label]
        rows[label] = (
            own if "preset" in own else merged(tuned.get(own.get("method", label), {}), own)
        )
    given = merged(setting.train, plan.quick.train) if quick else setting.train
    source = given.get("data", {}).get("source", "personas")
    if data_root is not None and source != "personas":
        given = merged(given, {"data": {"source": str(data_root / source)}})
    test = setting.test
    if data_root is not None and test.source is not None:
        test = test.model_copy(update={"source": str(data_root / test.source)})
    if data_root is not None and test.unseen is not None:
        test = test.model_copy(update={"unseen": str(data_root / test.unseen)})
    seeds = plan.quick.seeds if quick and plan.quick.seeds else setting.seeds or plan.seeds
    return comparison(rows, given, seeds, test, name, setting.about)
