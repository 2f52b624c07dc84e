"""State and history of a run in one safetensors file (JSON in its header), replaced atomically; no
pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedvpa.errors import CheckpointError
from fedvpa.files import write_atomically
from fedvpa.types import ServerState, digest_of

FORMAT = "fedvpa-checkpoint-1"


@dataclass(frozen=True)
class Checkpoint:
    """State after `state.round` rounds; `fingerprint` names the settings and data it belongs to."""

    state: ServerState
    history: list[dict[str, Any]]
    fingerprint: str
    finished: bool


class _Header(BaseModel):
    """What stands beside the tensors."""

    round: Annotated[int, Field(ge=0)]
    fingerprint: str
    finished: bool
    digest: str
    history: list[dict[str, float | None]]

    @field_validator("history")
    @classmethod
    def _with_rounds(cls, rows: list[dict[str, float | None]]) -> list[dict[str, float | None]]:
        if any(row.get("round") is None for row in rows):
            raise ValueError("a row without its round")
        return rows


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write aside, flush to the disk, rename: a reader sees the old file or the new one, whatever
    happens."""
    header = {
        "format": FORMAT,
        "round": checkpoint.state.round,
        "fingerprint": checkpoint.fingerprint,
        "finished": checkpoint.finished,
        "history": checkpoint.history,
    }
    # copies: what is served may share its memory with what it was chosen from
    tensors = {
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in checkpoint.state.tensors().items()
    }
    header["digest"] = _digest(header, tensors)
    # one key: equal states, equal bytes
    write_atomically(path, save(tensors, metadata={"fedvpa": json.dumps(header)}))


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hash of all that a checkpoint holds."""
    rest = json.dumps({name: v for name, v in header.items() if name != "digest"}, sort_keys=True)
    return hashlib.sha256(f"{rest}|{digest_of(tensors)}".encode()).hexdigest()


def load_checkpoint(path: Path, fingerprint: str | None = None) -> Checkpoint:
    """Read a checkpoint; with a `fingerprint`, refuse one that has another: it belongs to other
    settings or data.

    Raises:
        CheckpointError: missing, damaged, of another format, or of another run.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no checkpoint there")
    try:
        with safe_open(path, framework="pt") as file:
            header: Any = json.loads((file.metadata() or {}).get("fedvpa", "{}"))
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        kind = header.get("format") if isinstance(header, dict) else None
        if kind != FORMAT:
            raise CheckpointError(
                f"{path}: not a fedvpa checkpoint (format {kind!r}, wanted {FORMAT!r})"
            )
        _Header.model_validate(header)
        state = ServerState.from_tensors(header["round"], tensors)
        found = Checkpoint(state, header["history"], header["fingerprint"], header["finished"])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: damaged checkpoint: {place}: {first['msg']}") from error
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: damaged checkpoint: {error}") from error
    if _digest(header, tensors) != header["digest"]:
        raise CheckpointError(f"{path}: damaged: it does not hold what was written")
    if fingerprint is not None and found.fingerprint != fingerprint:
        raise CheckpointError(
            f"{path}: belongs to other settings or other data; it cannot be resumed with these"
        )
    return found
