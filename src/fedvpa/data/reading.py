"""Files, folders, archives or Hub datasets of preference records, to checked pairs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from fedvpa.config import DataConfig
from fedvpa.data.json_rows import Rows
from fedvpa.data.preferences import FIELDS, SEEN, Form, pairs_of
from fedvpa.data.tables import (
    SUFFIXES,
    Member,
    first_row,
    is_table,
    member_of,
    members_of_zip,
    rows_of,
    stem,
)
from fedvpa.errors import BadInputError, RecordError, TieError, UnusableRecordError
from fedvpa.records import PreferencePair

OnBadRecord = Literal["few", "error", "skip"]
FEW = 0.01
"""With ``on_bad_record="few"``: the share of a source's records below which those that compare
nothing are skipped."""
HUB = "hf://"
"""Before the name of a dataset or a model of the Hugging Face Hub."""
PEOPLE = (
    "user_id", "userid", "user", "username", "client", "clientid", "annotator", "annotator_id",
    "worker", "worker_id", "workerid", "rater", "rater_id", "raterid", "judge", "judge_id",
    "labeler", "labeler_id", "participant", "participant_id", "evaluator", "person", "author",
)  # fmt: skip
"""Names of columns that may well say who made a comparison."""


@dataclass
class PairSet:
    """The pairs of one source, what was left out of it (reason -> count, and the first ten
    messages), and what a reader should know of how it was understood."""

    pairs: list[PreferencePair]
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def groups(self) -> list[str]:
        """Sorted names of the groups present."""
        return sorted({p.group for p in self.pairs if p.group is not None})


def pairs_by(data: DataConfig, source: str | None = None) -> PairSet:
    """The pairs that the settings name, or those of another source, read in the same way.

    Raises:
        BadInputError: as `read_pairs`.
    """
    return read_pairs(
        data.source if source is None else source, data.split if source is None else None,
        data.on_bad_record, columns=data.columns, score_margin=data.score_margin,
    )  # fmt: skip


def read_pairs(
    source: str | Path, split: str | None = None, on_bad_record: OnBadRecord = "few", *,
    columns: Mapping[str, str] | None = None, score_margin: float = 0.0,
) -> PairSet:  # fmt: skip
    """Read preference pairs from a file, a folder, a zip archive, or a dataset of the Hub.

    Remembered while the files stay as they are: a comparison reads the same ones for every run.

    Args:
        source: a file, a folder (a folder per group, if there are several), or ``hf://`` and the
            name of a Hub dataset.
        split: only files called ``SPLIT.*``; a Hub dataset's split.
        on_bad_record: `few`: skip and count records that compare nothing while they are under 1 %
            of a file, and refuse the rest; `error`: refuse all; `skip`: skip and count all. Ties
            are skipped and counted however many there are, but for `error`.
        columns: field to the name of its column, as ``{"client_id": "user_id"}``.
        score_margin: rated completions make a pair where their ratings differ by more than this.

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
    named = tuple(sorted((columns or {}).items()))
    unknown = [name for name, _ in named if name not in FIELDS]
    if unknown:
        raise BadInputError(f"columns: no field '{unknown[0]}' (known: {', '.join(FIELDS)})")
    source = str(source)
    stamp = () if source.startswith(HUB) else _stamp(local_path(source))
    return _remembered(source, split, on_bad_record, named, score_margin, stamp)


def local_path(source: str) -> Path:
    """The path that a source's name stands for.

    Raises:
        BadInputError: a home directory that does not exist, or a name that is no path.
    """
    try:
        path = Path(source).expanduser()
        os.stat(path)
    except (RuntimeError, ValueError) as error:
        raise BadInputError(f"{source}: not a path: {error}") from error
    except OSError:
        return Path(source).expanduser()
    return path


def _stamp(path: Path) -> tuple[object, ...]:
    files = _all_files(path) if path.is_dir() else [path] * path.is_file()
    return tuple((str(f), s.st_mtime_ns, s.st_size) for f in files for s in [f.stat()])


@lru_cache(maxsize=4)
def _remembered(
    source: str, split: str | None, on_bad_record: OnBadRecord,
    columns: tuple[tuple[str, str], ...], score_margin: float, stamp: tuple[object, ...],
) -> PairSet:  # fmt: skip
    form = Form(dict(columns), score_margin)
    if source.startswith(HUB):
        found = PairSet([])
        name = source.removeprefix(HUB)
        _take_all(hub_rows(name, split or "train"), None, on_bad_record, form, found)
    else:
        found = _read_local(local_path(source), source, split, on_bad_record, form)
    if not found.pairs:
        why = [f"skipped: {n} x {reason}" for reason, n in found.skipped.most_common(5)]
        said = "; ".join([*why, *found.notes[:3]])
        raise BadInputError(f"{source}: no usable pair in it" + (f" ({said})" if said else ""))
    if form.agreed.said():
        found.notes.append(f"{source}: {form.agreed.said()}")
    return found


def _read_local(
    path: Path, source: str, split: str | None, on_bad_record: OnBadRecord, form: Form
) -> PairSet:
    found = PairSet([])
    members, found.notes = members_of(path, source, split)
    if len(members) > 1 or not path.is_file():
        unread = [m for m in members if not _holds_records(m)]
        members = [m for m in members if m not in unread]
        found.notes += [f"{m.label}: not read: it holds no records of comparisons" for m in unread]
        splits = sorted({m.stem for m in members})
        if split is None and len(splits) > 1:
            found.notes.append(
                f"{path}: {', '.join(splits)} are read together; --split NAME reads one of them"
            )
    groups = _group_names([m.path.parent for m in members])
    for member in members:
        wanted = {name.lower() for name in (*SEEN, *form.columns.values(), *PEOPLE)}
        rows = rows_of(member, wanted)
        if _take_all(rows, groups[member.path.parent], on_bad_record, form, found) == 0:
            raise RecordError(f"{member.label}:1", "the file is empty")
    return found


def members_of(path: Path, source: str, split: str | None) -> tuple[list[Member], list[str]]:
    """The data files of a file, a folder or an archive; and what is to be said of the choice.

    Raises:
        BadInputError: there is none, or none of the split.
    """
    if path.is_file() and path.suffix.lower() != ".zip":
        if split is not None and stem(path.name) != split:
            raise BadInputError(
                f"{path}: --split {split} was asked for, but --data names one file of another name"
            )
        return [member_of(path)], []
    if path.is_file():
        every, others = members_of_zip(path), list[str]()
    elif path.is_dir():
        files = _all_files(path)
        every = [member_of(f, path) for f in files if is_table(f.name)]
        others = [f.relative_to(path).as_posix() for f in files if not is_table(f.name)]
    else:
        raise _nothing_there(source, path)
    if not every:
        raise BadInputError(f"{path}: no preference files in it (looked for {', '.join(SUFFIXES)})")
    chosen = [m for m in every if split is None or m.stem == split]
    if not chosen:
        raise BadInputError(
            f"{path}: no file called {split}.*; found: {', '.join(sorted({m.stem for m in every}))}"
        )
    if split is not None or not others:
        return chosen, []
    shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if others[5:] else "")
    return chosen, [f"{path}: not read, as they are no data files: {shown}"]


def _all_files(folder: Path) -> list[Path]:
    """Every file below a folder, sorted; hidden ones and links that lead nowhere are none.

    Raises:
        BadInputError: a folder within it cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise BadInputError(f"{error.filename}: cannot be read: {error.strerror}") from error

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = [Path(place, name) for name in names if not name.startswith(".")]
        found += [file for file in files if file.is_file()]
    return sorted(found)


def _nothing_there(source: str, path: Path) -> BadInputError:
    """Never asks the Hub: what is a path here would become known there."""
    looks_like_a_path = source.startswith((".", "/", "~")) or source.endswith((*SUFFIXES, ".zip"))
    hub = "" if looks_like_a_path else f"; for a dataset of the Hub, write {HUB}{source}"
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    return BadInputError(f"{source}: no such file or folder{where}{hub}")


def _holds_records(member: Member) -> bool:
    """Whether the first row of a file within a folder is a record of a comparison, or broken."""
    found = first_row(member)
    known = {"chosen", "rejected", "response_a", "completions", "generations", "utterance_id"}
    row = None if found is None else found[1]
    # what is empty or broken is refused, not passed over
    return not isinstance(row, dict) or bool(known & row.keys()) or len(row) == 0


def _group_names(folders: list[PurePosixPath]) -> dict[PurePosixPath, str | None]:
    """Folder -> group: the leaf's name where that is unique, else the path from the root; the root
    itself has none."""
    unique = sorted(set(folders))
    root = PurePosixPath()
    leaves = Counter(f.name for f in unique)
    return {
        f: None if f == root else (f.name if leaves[f.name] == 1 else f.as_posix()) for f in unique
    }


def _take_all(
    rows: Rows, group: str | None, on_bad_record: OnBadRecord, form: Form, into: PairSet
) -> int:
    """Check every row of one file and keep the good ones; returns how many rows there were."""
    count, bad, ties = 0, list[RecordError](), list[RecordError]()
    for where, row in rows:
        count += 1
        if count == 1 and isinstance(row, dict):
            into.notes += _people_unread(row, where, form)
        try:
            if isinstance(row, RecordError):
                raise row
            pairs = pairs_of(row, where, form)
        except RecordError as error:
            harmless = isinstance(error, UnusableRecordError)
            if on_bad_record == "error" or (on_bad_record == "few" and not harmless):
                raise
            (ties if isinstance(error, TieError) else bad).append(error)
        else:
            into.pairs += [p if p.group is not None else replace(p, group=group) for p in pairs]
    if bad and on_bad_record == "few" and len(bad) >= FEW * count:
        first = bad[0]
        more = (
            f"{len(bad)} of {count} records of this file compare nothing; mend them, or pass"
            " --on-bad-record skip"
        )
        raise RecordError(
            first.where, first.reason, f"{first.advice}; {more}" if first.advice else more
        )
    into.skipped.update(error.reason for error in (*bad, *ties))
    into.first_skipped += [str(e) for e in (*bad, *ties)[: 10 - len(into.first_skipped)]]
    return count


def _people_unread(row: Mapping[str, Any], where: str, form: Form) -> list[str]:
    """Columns that look like the name of whoever chose, where no column is read as that."""
    if "client_id" in row or "client_id" in form.columns:
        return []
    found = [str(key) for key in row if str(key).lower() in PEOPLE]
    file = where.rpartition(":")[0] or where
    return [
        f"{file}: column '{name}' looks like a person's id and is not read; --column"
        f" client_id={name} makes a client of every person"
        for name in found[:1]
    ]


def hub_rows(name: str, split: str) -> Rows:
    """Rows of a dataset of the Hub, by name and split.

    Raises:
        BadInputError: the Hub has none, or cannot be reached.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    # the library raises anything from OSError to its own; all mean the same to the user
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise BadInputError(
            f"{HUB}{name}: the Hub gave no dataset of that name with split '{split}':"
            f" {type(error).__name__}: {reason}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{HUB}{name}[{split}]:{number}", row
