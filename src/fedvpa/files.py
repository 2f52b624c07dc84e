"""Files: written atomically, or not at all; JSON that every reader can read."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from fedvpa.errors import BadInputError


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


def claim(folder: Path, otherwise: str = "choose another --out", ignored: str = "") -> None:
    """Refuse a folder that holds something: results are never written over.

    Args:
        folder: where something is to be written; it need not exist.
        otherwise: what the user may do instead.
        ignored: name of an entry that may be there.

    Raises:
        BadInputError: a file, or a folder that is in use.
    """
    if folder.exists() and not folder.is_dir():
        raise BadInputError(f"{folder}: is a file; name a directory")
    # what an interrupted `write_atomically` has left is nothing
    entries = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    if any(name != ignored and not name.startswith(".") for name in entries):
        raise BadInputError(f"{folder}: not empty; {otherwise}")
