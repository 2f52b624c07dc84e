"""State and history of a run in one safetensors file (JSON in its header), replaced atomically; no
pickle."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedvpa.errors import CheckpointError
from fedvpa.types import ServerState

FORMAT = "fedvpa-checkpoint-1"


@dataclass(frozen=True)
class Checkpoint:
    """State after `state.round` rounds; `fingerprint` names the settings and data it belongs to."""

    state: ServerState
    history: list[dict[str, Any]]
    fingerprint: str
    finished: bool


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
    tensors = {name: value.contiguous() for name, value in checkpoint.state.tensors().items()}
    # one key: equal states, equal bytes
    write_atomically(path, save(tensors, metadata={"fedvpa": json.dumps(header)}))


def load_checkpoint(path: Path, fingerprint: str | None = None) -> Checkpoint:
    """Read a checkpoint; with `fingerprint`, refuse one that belongs to other settings or data.

    Raises:
        CheckpointError: missing, damaged, of another format, or of another run.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no checkpoint there")
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {}).get("fedvpa", "{}"))
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: not a fedvpa checkpoint (format {header.get('format')!r}, wanted"
                f" {FORMAT!r})"
            )
        state = ServerState.from_tensors(header["round"], tensors)
        found = Checkpoint(state, header["history"], header["fingerprint"], header["finished"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: damaged checkpoint: {error}") from error
    if fingerprint is not None and found.fingerprint != fingerprint:
        raise CheckpointError(
            f"{path}: belongs to other settings or other data; it cannot be resumed with these"
        )
    return found


def plain_json(content: Any) -> bytes:
    """Indented JSON that every reader can read: NaN and Inf become null."""
    return (json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n").encode()


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return value


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path` by `content`, or leave it as it was.

    Raises:
        OSError: the disk is full or not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
