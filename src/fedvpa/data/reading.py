"""Files and folders of preference records, or a Hub dataset, to checked pairs (jsonl, jsonl.gz,
parquet)."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from fedvpa.data.preferences import is_no_comparison, parse_record
from fedvpa.errors import BadInputError, RecordError
from fedvpa.records import PreferencePair

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
OnBadRecord = Literal["few", "error", "skip"]
FEW = 0.01
"""With ``on_bad_record="few"``: the share of a file's records below which those that compare
nothing are skipped."""


@dataclass
class PairSet:
    """The pairs of one source, and what was left out of it (reason -> count, and the first ten
    messages)."""

    pairs: list[PreferencePair]
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: list[str] = field(default_factory=list)

    @property
    def groups(self) -> list[str]:
        """Sorted names of the groups present."""
        return sorted({p.group for p in self.pairs if p.group is not None})


def read_pairs(
    source: str | Path, split: str | None = None, on_bad_record: OnBadRecord = "few"
) -> PairSet:
    """Read preference pairs from a file, a folder, or a dataset of the Hub.

    Remembered while the files stay as they are: a comparison reads the same ones for every run.

    Args:
        source: a file, a folder (a folder per group, if there are several), or a Hub dataset's
            name.
        split: only files called ``SPLIT.*``; a Hub dataset's split.
        on_bad_record: `few`: skip and count records that compare nothing while they are under 1 %
            of a file, and refuse the rest; `error`: refuse all; `skip`: skip and count all.

    Raises:
        BadInputError: nothing there, or a record that cannot be used: with file, line and reason.

    Example:
        >>> import json, pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "pairs.jsonl")
        >>> record = {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No.", "client_id": "ann"}
        >>> _ = file.write_text(json.dumps(record))
        >>> read_pairs(file).pairs[0].client_id
        'ann'
    """
    source = str(source)
    path = Path(source).expanduser()
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    stamp = tuple((str(f), s.st_mtime_ns, s.st_size) for f in files for s in [f.stat()])
    return _remembered(source, split, on_bad_record, stamp)


@lru_cache(maxsize=4)
def _remembered(
    source: str, split: str | None, on_bad_record: OnBadRecord, stamp: tuple[object, ...]
) -> PairSet:
    return read_pairs_anew(source, split, on_bad_record)


def read_pairs_anew(
    source: str, split: str | None = None, on_bad_record: OnBadRecord = "few"
) -> PairSet:
    """Read every pair of a file, a folder, a folder of folders (one group each), or a Hub dataset.

    `on_bad_record`: ``"error"`` refuses the first bad record, ``"skip"`` counts and leaves out all
    of them. ``"few"``, the default, leaves out and counts well-formed records that compare nothing
    (an empty reply, two identical replies, two different prompts) while they are under 1 % of a
    file, and refuses everything else.

    Raises:
        RecordError: a refused record, with file, line and reason.
        BadInputError: nothing to read at `source`, or no usable pair in it.
    """
    path = Path(source).expanduser()
    result = PairSet([])
    if path.is_file():
        if split is not None and _stem(path) != split:
            raise BadInputError(
                f"{path}: --split {split} was asked for, but --data names one file of another name"
            )
        _read_file(path, None, on_bad_record, result)
    elif path.is_dir():
        files = find_files(path, split)
        groups = _group_names(path, [f.parent for f in files])
        for file in files:
            _read_file(file, groups[file.parent], on_bad_record, result)
    elif (
        source.count("/") <= 1
        and not source.startswith((".", "/", "~"))
        and not source.endswith(SUFFIXES)
    ):
        _read_hub(source, split or "train", on_bad_record, result)
    else:
        raise BadInputError(f"{source}: no such file or folder")
    if not result.pairs:
        why = "; ".join(f"{n} x {reason}" for reason, n in result.skipped.most_common(5))
        raise BadInputError(
            f"{source}: no usable pair in it" + (f" (skipped: {why})" if why else "")
        )
    return result


def find_files(folder: Path, split: str | None) -> list[Path]:
    """All data files below `folder`, or those called `split`.*, sorted.

    Raises:
        BadInputError: none is there; the message lists the splits that are.
    """
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name.endswith(SUFFIXES))
    if not files:
        raise BadInputError(
            f"{folder}: no preference files in it (looked for {', '.join(SUFFIXES)})"
        )
    chosen = [f for f in files if split is None or _stem(f) == split]
    if not chosen:
        raise BadInputError(
            f"{folder}: no file called {split}.*; found:"
            f" {', '.join(sorted({_stem(f) for f in files}))}"
        )
    return chosen


def _stem(path: Path) -> str:
    return next(
        path.name.removesuffix(s)
        for s in sorted(SUFFIXES, key=len, reverse=True)
        if path.name.endswith(s)
    )


def _group_names(root: Path, folders: list[Path]) -> dict[Path, str | None]:
    """Folder -> group: the leaf's name where that is unique, else the path from the root; the root
    itself has none."""
    unique = sorted(set(folders))
    leaves = Counter(f.name for f in unique)
    return {
        f: (
            None
            if f == root
            else (f.name if leaves[f.name] == 1 else f.relative_to(root).as_posix())
        )
        for f in unique
    }


def _read_file(path: Path, group: str | None, on_bad_record: OnBadRecord, into: PairSet) -> None:
    if not path.name.endswith(SUFFIXES):
        raise BadInputError(f"{path}: unknown kind of file (known: {', '.join(SUFFIXES)})")
    rows = _parquet_rows(path) if path.name.endswith(".parquet") else _json_lines(path)
    if _take_all(rows, group, on_bad_record, into) == 0:
        raise RecordError(f"{path}:1", "the file is empty")


def _take_all(
    rows: Iterable[tuple[str, Any]], group: str | None, on_bad_record: OnBadRecord, into: PairSet
) -> int:
    """Check every row of one file and keep the good ones; returns how many rows there were."""
    count, bad = 0, list[RecordError]()
    for where, row in rows:
        count += 1
        try:
            if isinstance(row, RecordError):
                raise row
            pair = parse_record(row, where)
        except RecordError as error:
            if on_bad_record == "error" or (on_bad_record == "few" and not is_no_comparison(error)):
                raise
            bad.append(error)
        else:
            into.pairs.append(pair if pair.group is not None else replace(pair, group=group))
    if bad and on_bad_record == "few" and len(bad) >= FEW * count:
        first = bad[0]
        more = (
            f"{len(bad)} of {count} records of this file compare nothing; mend them, or pass"
            " --on-bad-record skip"
        )
        raise RecordError(
            first.where, first.reason, f"{first.advice}; {more}" if first.advice else more
        )
    into.skipped.update(error.reason for error in bad)
    into.first_skipped += [str(error) for error in bad[: 10 - len(into.first_skipped)]]
    return count


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file:line, value); a line that cannot be read yields the error in place of the
    value."""
    line_number = 0
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as stream:
            for line_number, raw in enumerate(stream, start=1):
                if raw.strip():
                    yield f"{path}:{line_number}", _decode(raw, f"{path}:{line_number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RecordError(
            f"{path}:{line_number + 1}",
            f"truncated or damaged gzip after line {line_number}",
            f"{error}",
        ) from error
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _decode(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RecordError(
            where, "undecodable bytes", f"not UTF-8 at byte {error.start} of the line"
        )
    except json.JSONDecodeError as error:
        advice = (
            "a JSON list over several lines? write one object per line"
            if raw.strip() == b"["
            else error.msg
        )
        return RecordError(where, "not JSON", f"{advice}, column {error.colno}")
    except (RecursionError, ValueError) as error:
        return RecordError(where, "not JSON", f"{type(error).__name__}: {error}"[:120])


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    row_number = 0
    try:
        table = pq.ParquetFile(path)
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                row_number += 1
                yield f"{path}:{row_number}", row
    except (pa.ArrowException, OSError) as error:
        raise RecordError(
            f"{path}:{row_number + 1}", "damaged parquet file", str(error).splitlines()[0][:160]
        ) from error


def _read_hub(name: str, split: str, on_bad_record: OnBadRecord, into: PairSet) -> None:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    # the library raises anything from OSError to its own; all mean the same to the user
    except Exception as error:
        raise BadInputError(
            f"{name}: no such file or folder, and the Hub gave no dataset of that name with split"
            f" '{split}': {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        ) from error
    _take_all(
        ((f"{name}[{split}]:{n}", row) for n, row in enumerate(rows, start=1)),
        None,
        on_bad_record,
        into,
    )
