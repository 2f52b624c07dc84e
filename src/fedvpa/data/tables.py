"""Rows of files, whatever kind they are of: JSON lines, JSON, CSV, TSV, Parquet, Arrow; plain,
gzip'd, or in a zip archive.

A row comes with its place (``file:line``, ``file[record]``, ``archive.zip!file:line``); one that
cannot be read comes as the error. In CSV and TSV every cell is text and an empty cell is missing; a
cell that holds a list of messages, as JSON or as Python writes it, is read as one. Lines end at
``\\n`` alone.
"""

from __future__ import annotations

import ast
import csv
import gzip
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedvpa.data.json_rows import Rows, json_rows
from fedvpa.errors import BadInputError, RecordError

_LINES = (".jsonl", ".ndjson", ".json")
_CELLS = (".csv", ".tsv")
_TEXT = (*_LINES, *_CELLS)
_COLUMNS = (".parquet", ".arrow", ".feather")
_LISTS = ("completions", "scores", "generations", "ratings")
"""Columns of CSV files that hold lists of whatever."""
SUFFIXES = (*_TEXT, *(f"{suffix}.gz" for suffix in _TEXT), *_COLUMNS)
"""Endings of the files that are read; and ``.zip`` archives of them."""
MOST_UNPACKED = 8 << 30
"""Bytes of an archive's members that are unpacked, at most."""

csv.field_size_limit(1 << 30)


@dataclass(frozen=True)
class Member:
    """A file of a source: what it is called in messages, its path within the source, and how it is
    opened."""

    label: str
    path: PurePosixPath
    open: Callable[[], Any]

    @property
    def stem(self) -> str:
        """Name without its ending: the split."""
        return stem(self.path.name)

    @property
    def kind(self) -> str:
        """Its ending in small letters, without ``.gz``, as ``.csv``."""
        return PurePosixPath(self.path.name.lower().removesuffix(".gz")).suffix

    @property
    def packed(self) -> bool:
        """Whether it is gzip'd."""
        return self.path.name.lower().endswith(".gz")


def is_table(name: str) -> bool:
    """Whether a file of this name is read."""
    return name.lower().endswith(SUFFIXES)


def stem(name: str) -> str:
    """A file's name without the ending that says its kind."""
    endings = sorted((*SUFFIXES, ".zip"), key=len, reverse=True)
    return next((name[: -len(s)] for s in endings if name.lower().endswith(s)), name)


def member_of(path: Path, root: Path | None = None) -> Member:
    """A file of its own, or of the folder `root`."""
    inner = path.relative_to(root) if root is not None else Path(path.name)
    return Member(str(path), PurePosixPath(inner.as_posix()), lambda: path.open("rb"))


def members_of_zip(path: Path) -> list[Member]:
    """The files of an archive that can be read, sorted.

    Raises:
        BadInputError: no archive, encrypted, far larger than it looks, or with paths that lead out
            of it.
    """
    try:
        archive = zipfile.ZipFile(path)
        names = [i for i in archive.infolist() if not i.is_dir() and is_table(i.filename)]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise BadInputError(f"{path}: damaged zip archive: {error}") from error
    if any(entry.flag_bits & 1 for entry in names):
        raise BadInputError(f"{path}: the archive is encrypted; unpack it first")
    if sum(entry.file_size for entry in names) > MOST_UNPACKED:
        raise BadInputError(
            f"{path}: the archive holds more than {MOST_UNPACKED >> 30} GiB; unpack it first"
        )
    named = {
        entry.filename: _opener(archive, entry)
        for entry in sorted(names, key=lambda entry: entry.filename)
        if not entry.filename.startswith("__MACOSX/")
        and not PurePosixPath(entry.filename).name.startswith(".")
    }
    stray = [n for n in named if n.startswith("/") or ".." in PurePosixPath(n).parts]
    if stray:
        raise BadInputError(f"{path}: the archive holds {stray[0]!r}, a path that leads out of it")
    tops = {PurePosixPath(name).parts[0] for name in named}
    # an archive of a folder begins with the folder's name
    inside = len(tops) == 1 and all(len(PurePosixPath(name).parts) > 1 for name in named)
    return [
        Member(
            f"{path}!{name}",
            PurePosixPath(*PurePosixPath(name).parts[1:]) if inside else PurePosixPath(name),
            opened,
        )
        for name, opened in named.items()
    ]


def _opener(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Callable[[], Any]:
    return lambda: archive.open(entry)


def rows_of(member: Member, wanted: Collection[str] | None = None) -> Rows:
    """Every row of a file with its place.

    Args:
        member: the file.
        wanted: columns of a column-wise file that are needed, in small letters (None: all); the
            others are not decoded.

    Raises:
        RecordError: the file as a whole is damaged.
        BadInputError: it cannot be read, or is of an unknown kind.
    """
    if not is_table(member.path.name):
        raise BadInputError(f"{member.label}: unknown kind of file (known: {', '.join(SUFFIXES)})")
    try:
        if member.kind in _COLUMNS:
            yield from _columnwise(member, wanted)
            return
        with _bytes(member) as stream:
            if member.kind in _CELLS:
                yield from _cells(stream, member)
            else:
                yield from json_rows(stream, member.label, member.kind == ".json")
    except zipfile.BadZipFile as error:
        raise BadInputError(f"{member.label}: damaged in its archive: {error}") from error
    except OSError as error:
        raise BadInputError(f"{member.label}: cannot be read: {error.strerror or error}") from error


def first_row(member: Member) -> tuple[str, Any] | None:
    """The first row of a file with its place; None if it has none."""
    with closing(rows_of(member)) as rows:
        return next(rows, None)


@contextmanager
def _bytes(member: Member) -> Iterator[Any]:
    with member.open() as raw:
        if member.packed:
            with gzip.open(raw, "rb") as stream:
                yield stream
        else:
            yield raw


# CSV and TSV


def _cells(stream: Any, member: Member) -> Rows:
    """A row per record, by the names in the first one."""
    delimiter = "\t" if member.kind == ".tsv" else ","
    reader = csv.reader(_decoded(stream, member), delimiter=delimiter, strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            where = f"{member.label}:{reader.line_num}"
            if not names:
                names = [cell.strip() for cell in cells]
                twice = [name for name in names if name and names.count(name) > 1]
                if twice:
                    raise RecordError(where, f"two columns are called '{twice[0]}'", "rename one")
                if len(names) == 1 and re.search(r"[;\t|,]", names[0]):
                    raise RecordError(
                        where, f"one column alone, called '{names[0][:60]}'",
                        "cells of a .csv are separated by commas, those of a .tsv by tabs",
                    )  # fmt: skip
            elif not any(cells):
                continue
            elif len(cells) != len(names):
                yield where, RecordError(
                    where, f"{len(cells)} cells under {len(names)} names",
                    "quote cells that hold the delimiter or line breaks",
                )  # fmt: skip
            else:
                yield where, {name: _cell(name, cell) for name, cell in zip(names, cells)}
    except csv.Error as error:
        raise RecordError(
            f"{member.label}:{reader.line_num}",
            "not CSV",
            f"{error}; cells that hold quotes or line breaks stand in quotes, and quotes within"
            " them are doubled",
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RecordError(
            f"{member.label}:{reader.line_num + 1}", "truncated or damaged gzip", str(error)
        ) from error


def _decoded(stream: Any, member: Member) -> Iterator[str]:
    for number, raw in enumerate(stream, start=1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise RecordError(
                f"{member.label}:{number}",
                "undecodable bytes",
                f"not UTF-8 at byte {error.start} of the line; write the file as UTF-8",
            ) from error


def _cell(name: str, text: str) -> Any:
    """A cell: text, or the list of messages (or of ratings) that it spells; None for an empty
    one."""
    if text == "":
        return None
    if not (text.startswith("[") and text.rstrip().endswith("]")):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and found:
            kinds = dict | str | int | float if name in _LISTS else dict
            if all(isinstance(v, kinds) for v in found):
                return found
    return text


# Parquet, Arrow, Feather


def _columnwise(member: Member, wanted: Collection[str] | None) -> Rows:
    number = 0
    try:
        for batch in _batches(member, wanted):
            for row in _records(batch, member.label, number):
                number += 1
                yield f"{member.label}:{number}", row
    except (pa.ArrowException, OSError, ValueError) as error:
        kind = "parquet" if member.kind == ".parquet" else "Arrow"
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecordError(
            f"{member.label}:{number + 1}", f"damaged {kind} file", first[:160]
        ) from error


def _batches(member: Member, wanted: Collection[str] | None) -> Iterator[Any]:
    with member.open() as stream:
        if member.kind == ".parquet":
            file = pq.ParquetFile(stream)
            yield from file.iter_batches(1024, columns=_needed(file.schema_arrow, wanted))
            return
        whole = stream.read()
        if whole[:4] == b"FEA1":
            raise ValueError("Feather version 1; write version 2 (Arrow IPC)")
        opened = pa.ipc.open_file if whole[:6] == b"ARROW1" else pa.ipc.open_stream
        table = opened(pa.BufferReader(whole)).read_all()
    yield from table.select(_needed(table.schema, wanted)).to_batches(1024)


def _needed(schema: Any, wanted: Collection[str] | None) -> list[str]:
    """Columns to decode: dates and durations hold nothing that is read, and may be out of Python's
    range."""
    return [
        field.name
        for field in schema
        if (wanted is None or field.name.lower() in wanted) and not pa.types.is_temporal(field.type)
    ]


def _records(batch: Any, label: str, before: int) -> list[Any]:
    """The rows of a batch; one that cannot be decoded is the error."""
    try:
        found: list[Any] = batch.to_pylist()
    except (UnicodeDecodeError, pa.ArrowException, ValueError, OverflowError):
        return [_record(batch, i, f"{label}:{before + i + 1}") for i in range(batch.num_rows)]
    return found


def _record(batch: Any, i: int, where: str) -> Any:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns):
        try:
            row[name] = column[i].as_py()
        except (UnicodeDecodeError, pa.ArrowException, ValueError, OverflowError) as error:
            reason = str(error).splitlines()[0][:120]
            return RecordError(where, f"column '{name}' cannot be decoded", reason)
    return row
