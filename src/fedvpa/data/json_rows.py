"""Rows of JSON: a record per line, or a document."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Generator, Iterator
from typing import Any

from fedvpa.errors import RecordError

Rows = Generator[tuple[str, Any], None, None]
"""Rows of a file, each with its place; one that cannot be read is the error."""


def json_rows(stream: Any, label: str, whole: bool) -> Rows:
    """A record per line; or one list, or (if it may be `whole`) one object, over all of it.

    Raises:
        RecordError: a damaged gzip file.
    """
    number = 0
    try:
        first = _first_line(stream)
        begun = first.lstrip(b"\xef\xbb\xbf \t\r\n")
        if begun.startswith(b"[") or (whole and begun.startswith(b"{") and not _whole(first)):
            yield from _one_document(first + stream.read(), label)
            return
        for number, raw in enumerate(_with_first(first, stream), start=1):
            if raw.strip():
                yield f"{label}:{number}", json_of(raw, f"{label}:{number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RecordError(
            f"{label}:{number + 1}", f"truncated or damaged gzip after line {number}", f"{error}"
        ) from error


def _first_line(stream: Any) -> bytes:
    """Up to the first line that is not empty, and all before it."""
    read = b""
    for line in stream:
        read += line
        if line.strip():
            break
    return read


def _with_first(first: bytes, stream: Any) -> Iterator[bytes]:
    yield from first.splitlines(keepends=True) if first.count(b"\n") > 1 else [first]
    yield from stream


def _whole(line: bytes) -> bool:
    return not isinstance(json_of(line.strip(), ""), RecordError)


def _one_document(raw: bytes, label: str) -> Rows:
    found = json_of(raw, label)
    if isinstance(found, RecordError):
        line = f":{raw[: _position(raw)].count(b'%c' % 10) + 1}"
        yield (f"{label}{line}", RecordError(f"{label}{line}", found.reason, found.advice))
    elif isinstance(found, list):
        for n, record in enumerate(found, start=1):
            yield f"{label}[{n}]", record
    else:
        yield f"{label}[1]", found


def _position(raw: bytes) -> int:
    try:
        json.loads(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return error.pos
    except (UnicodeDecodeError, RecursionError, ValueError):
        return 0
    return 0


def json_of(raw: bytes, where: str) -> Any:
    """A JSON value; what cannot be read is returned as the error."""
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_without_repetition)
    except UnicodeDecodeError as error:
        return RecordError(
            where, "undecodable bytes", f"not UTF-8 at byte {error.start} of the line"
        )
    except json.JSONDecodeError as error:
        return RecordError(where, "not JSON", f"{error.msg}, column {error.colno}")
    except _RepeatedKeyError as error:
        return RecordError(where, f"key '{error}' stands twice in one object", "keep one of them")
    except (RecursionError, ValueError) as error:
        return RecordError(where, "not JSON", f"{type(error).__name__}: {error}"[:120])


class _RepeatedKeyError(Exception):
    pass


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(next(key for key in keys if keys.count(key) > 1)[:60])
    return out
