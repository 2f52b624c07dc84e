"""What a run's files must hold: every file is checked when a run is opened, and named if it is
damaged, edited, or another run's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedvpa.config import Config
from fedvpa.errors import CheckpointError
from fedvpa.types import ServerState

ELSEWHERE = {"out", "tracker"}
"""Settings that say where a run is kept, not what it is."""
FITTED = {"population": {"mean": 2, "variance": 1, "weight": 1}, "components": {}}
"""Sections of a state that are empty until something has been fitted, with the axes of each of
their tensors (no entry: any)."""
T = TypeVar("T", bound=BaseModel)
Count = Annotated[int, Field(ge=0)]


class ClientRow(BaseModel):
    """A training client: its name, true group, and how many pairs it has (None: elsewhere)."""

    name: str
    group: str | None
    pairs: Count | None
    validation_pairs: Count | None


class RunData(BaseModel):
    """``data.json``: what a run was trained on. `identity` names the run's settings, data and
    backbone; `settings` is a hash of its settings, `checksum` of all the rest of the file."""

    model_config = ConfigDict(extra="ignore")

    fedvpa: str
    identity: str
    settings: str
    checksum: str
    backbone: str | None
    signature: str
    clients: Annotated[list[ClientRow], Field(min_length=1)]
    skipped: dict[str, Count] = {}
    first_skipped: list[str] = []
    notes: list[str] = []
    texts: dict[str, Count] = {}


def settings_hash(config: Config) -> str:
    """Hash of the settings that decide what a run is."""
    settings = config.model_dump(mode="json", exclude=ELSEWHERE)
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """The contents of ``data.json`` with their checksum."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    text = json.dumps(rest, sort_keys=True)
    return rest | {"checksum": hashlib.sha256(text.encode()).hexdigest()}


def read_data(root: Path, config: Config) -> RunData:
    """What the run in `root` was trained on.

    Raises:
        CheckpointError: the file is missing, damaged, of an earlier version, or of other settings
            than `config.yaml` has.
    """
    path = root / "data.json"
    found = read_json(path, RunData)
    content = json.loads(path.read_bytes())
    if content != with_checksum(content):
        raise CheckpointError(f"{path}: damaged: it is not what was written")
    if found.settings != settings_hash(config):
        raise CheckpointError(
            f"{root / 'config.yaml'}: has other settings than the run was trained with, or is of an"
            " earlier version with other defaults; put it back as it was, or train another run"
        )
    return found


def read_json(path: Path, model: type[T]) -> T:
    """A JSON file of a run, checked.

    Raises:
        CheckpointError: naming the file, and what is wrong.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "missing" and place in ("identity", "settings", "checksum"):
            raise CheckpointError(
                f"{path}: is of an earlier version of fedvpa, which prepared texts in another way;"
                " train the run again"
            ) from error
        raise CheckpointError(f"{path}: damaged: {place}: {first['msg']}") from error


def check_state(path: Path, state: ServerState, template: ServerState) -> None:
    """Compare a checkpoint's tensors with those that the run's settings call for.

    Args:
        path: the checkpoint, for messages.
        state: what it holds.
        template: the state in which the run began.

    Raises:
        CheckpointError: a tensor is missing, too many, of another shape or type, or not finite.
    """
    found, wanted = state.tensors(), template.tensors()
    for name, value in wanted.items():
        own = found.get(name)
        if own is None:
            raise CheckpointError(f"{path}: damaged: it has no tensor {name}")
        if own.shape != value.shape or own.dtype != value.dtype:
            raise CheckpointError(
                f"{path}: damaged: {name} is {own.dtype} {list(own.shape)}; these settings call for"
                f" {value.dtype} {list(value.shape)}"
            )
    fitted: dict[str, set[int]] = {}
    for name in sorted(set(found) - set(wanted)):
        section, _, part = name.partition("/")
        axes = FITTED.get(section)
        if axes is None or (axes and axes.get(part) != found[name].dim()):
            raise CheckpointError(f"{path}: damaged: it has a tensor {name} that is not known")
        if axes:
            fitted.setdefault(section, set()).add(found[name].shape[0])
    if any(len(sizes) > 1 for sizes in fitted.values()):
        raise CheckpointError(f"{path}: damaged: its components differ in number")
    for name, value in found.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(f"{path}: damaged: {name} holds NaN or Inf")
