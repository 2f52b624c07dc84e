"""Files: written atomically, or not at all; JSON that every reader can read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any

from fedvpa.errors import BadInputError

_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{n}{i}" for n in ("COM", "LPT") for i in range(1, 10))}
"""Names that some systems keep for devices."""


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


def write_atomically(path: Path, content: bytes, *, private: bool = False) -> None:
    """Replace the file at `path` by `content`, or leave it as it was.

    A new file has its final mode before it holds anything: that of the umask, or readable for this
    user alone if it is `private`. An existing file keeps its mode (less what `private` forbids). A
    symbolic link is followed. A device or a pipe is written to; it is not replaced.

    Raises:
        OSError: the disk is full or not writable.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as file:
            file.write(content)
        return
    make_folder(path.parent)
    mode = 0o600 if private else 0o666
    aside = path.with_name(f".{path.name[:100]}-{secrets.token_hex(6)}")
    # the system applies the umask, as for any other file that this user makes
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            if path.is_file():
                kept = stat.S_IMODE(path.stat().st_mode) & (0o700 if private else 0o777)
                os.fchmod(file.fileno(), kept)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def private_file(path: Path) -> Path:
    """Make the file for this user alone; one that is there already is closed to strangers."""
    make_folder(path.parent)
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        status = os.fstat(handle)
        if status.st_uid == os.geteuid() and status.st_mode & 0o007:
            os.fchmod(handle, status.st_mode & 0o770)
    finally:
        os.close(handle)
    return path


def make_folder(folder: Path, *, private: bool = False) -> Path:
    """The folder, made with its final mode if it is not there; `private`: for this user alone,
    also if it was there before.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o777)
    status = folder.stat()
    if private and status.st_uid == os.geteuid() and status.st_mode & 0o077:
        folder.chmod(status.st_mode & 0o700)
    return folder


def file_name(name: str) -> str:
    """A file name for a name from outside: without separators, never ``..``, never hidden, at most
    80 characters, and another one for every other name. Names of letters, digits, ``-``, ``_`` and
    ``.`` stay as they are, as does ``+``.

    >>> file_name("user-7"), file_name("../../x")
    ('user-7', 'x-9cdf6a50')
    """
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.")[:64]
    made_here = re.search(r"-[0-9a-f]{8}$", name)
    if plain and plain == name and name.upper() not in _RESERVED and not made_here:
        return plain
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain or 'name'}-{digest}"


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
    # what an interruption has left is nothing: folders without files, files that were not finished
    files = [p.relative_to(folder) for p in folder.rglob("*") if not p.is_dir()]
    if any(f.parts[0] != ignored and not f.name.startswith(".") for f in files):
        raise BadInputError(f"{folder}: not empty; {otherwise}")
