"""Features of texts, computed once: a content-addressed cache in SQLite, safe under several
processes and under kill -9.

A feature's key is a hash of everything that decides its value: weights, how texts are prepared,
chat template, limits, number type, layer, pooling and text. The backbone is loaded only if
something is missing. Every row carries a checksum: one that was damaged is computed anew.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.config import FeaturesConfig
from fedvpa.errors import RunError
from fedvpa.features.backbone import Backbone, Tap
from fedvpa.features.chat import PREPARATION, Note, counted
from fedvpa.features.loading import cache_home, dtype_of, location_stamp
from fedvpa.files import make_folder, private_file
from fedvpa.records import Item, Message, PreferencePair, Progress

CREATING_SECONDS = 60.0
"""How long to wait for another process that creates the cache."""
_SCHEMA = """
DROP TABLE IF EXISTS feature;  -- of 0.1.0: without checksums, of texts prepared in another way
CREATE TABLE IF NOT EXISTS text
  (key BLOB PRIMARY KEY, notes INTEGER NOT NULL, checksum INTEGER NOT NULL, value BLOB NOT NULL)
  WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS backbone
  (stamp TEXT PRIMARY KEY, name TEXT NOT NULL, signature TEXT NOT NULL);
"""
logger = logging.getLogger("fedvpa")


class Features(NamedTuple):
    """Features of n texts, the backbone that they come from, its signature, how many texts had to
    be computed, and what was done to how many of them before they were read."""

    values: Float[Tensor, "n h"]
    backbone: str
    signature: str
    computed: int
    notes: Counter[str]


class FeatureTable(NamedTuple):
    """Features of n pairs (chosen, rejected); the rest as in `Features`."""

    values: Float[Tensor, "n 2 h"]
    backbone: str
    signature: str
    computed: int
    notes: Counter[str]


class FeatureCache:
    """Features by content, in ``$FEDVPA_CACHE/features.sqlite``.

    Args:
        settings: which backbone, and how its features are read.
        path: another file.
        keep: False: everything is computed when it is asked for and kept nowhere, as for users who
            may ask to be forgotten.
    """

    def __init__(
        self, settings: FeaturesConfig, path: Path | None = None, keep: bool = True
    ) -> None:
        self.settings, self._keep = settings, keep
        self.path = path or cache_home() / "features.sqlite"
        self._backbone: Backbone | None = None

    def pairs(
        self, pairs: Sequence[PreferencePair], progress: Progress | None = None
    ) -> FeatureTable:
        """Features of both responses of every pair.

        Raises:
            BadInputError: the backbone cannot be loaded, or lacks the layer.
            RunError: the cache cannot be read or written.
        """
        items = [Item(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
        found = self.items(items, progress, [pair.source for pair in pairs for _ in range(2)])
        return FeatureTable(found.values.view(len(pairs), 2, -1), *found[1:])

    def identity(self) -> tuple[str, int]:
        """The backbone's signature, and the width of its features.

        Raises:
            BadInputError: the backbone cannot be loaded, or lacks the layer.
        """
        found = self.items([Item((Message("user", "."),), ".")])
        return found.signature, found.values.shape[-1]

    def items(
        self, items: Sequence[Item], progress: Progress | None = None, where: Sequence[str] = ()
    ) -> Features:
        """Features of responses to prompts; `where` says where each comes from, for messages.

        Raises:
            BadInputError: the backbone cannot be loaded, lacks the layer, or refuses a prompt.
            RunError: the cache cannot be read or written.
        """
        if not self._keep:
            return self._computed(items)
        try:
            make_folder(self.path.parent)
            # readable for this user alone: it holds features of private texts
            private_file(self.path)
            with closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as database:
                _prepare(database)
                return self._items(database, items, progress, where)
        except sqlite3.Error as error:
            raise RunError(
                f"the feature cache {self.path} cannot be used: {error}; set FEDVPA_CACHE elsewhere"
            ) from error

    def _computed(self, items: Sequence[Item]) -> Features:
        backbone, tap = self.backbone()
        prepared = backbone.prepare(items)
        values = backbone.encode(items, [tap], prepared=prepared)[:, 0]
        notes = counted(Note(int(row.notes)) for row in prepared)
        return Features(values, backbone.name, backbone.signature(tap), len(items), notes)

    def _items(
        self, database: sqlite3.Connection, items: Sequence[Item], progress: Progress | None,
        where: Sequence[str],
    ) -> Features:  # fmt: skip
        name, signature = self._identity(database)
        keys = [_key(signature, item) for item in items]
        found = dict(_lookup(database, set(keys)))
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in found}
        todo = list(reversed(first.items()))
        if todo:
            missing = [items[i] for _, i in todo]
            backbone, tap = self.backbone()
            prepared = backbone.prepare(missing, [where[i] for _, i in todo] if where else ())

            def keep(index: list[int], block: Tensor) -> None:
                rows = [
                    _Row(int(prepared[i].notes), block[j, 0].numpy().astype("<f4").tobytes())
                    for j, i in enumerate(index)
                ]
                new = {todo[i][0]: row for i, row in zip(index, rows)}
                database.execute("BEGIN IMMEDIATE")
                database.executemany(
                    "INSERT OR REPLACE INTO text VALUES (?, ?, ?, ?)",
                    [(key, row.notes, row.checksum, row.value) for key, row in new.items()],
                )
                database.execute("COMMIT")
                found.update(new)

            backbone.encode(missing, [tap], on_batch=keep, progress=progress, prepared=prepared)
        table = (
            np.stack([np.frombuffer(found[k].value, dtype="<f4") for k in keys])
            if keys
            else np.zeros((0, 0), "<f4")
        )
        notes = counted(Note(found[key].notes) for key in keys)
        values = torch.from_numpy(table.astype(np.float32))
        return Features(values, name, signature, len(todo), notes)

    def backbone(self) -> tuple[Backbone, Tap]:
        """The loaded model and where its features are read."""
        if self._backbone is None:
            s = self.settings
            self._backbone = Backbone(
                s.backbone,
                max_prompt_tokens=s.max_prompt_tokens,
                max_response_tokens=s.max_response_tokens,
                device=s.device,
                dtype=dtype_of(s.dtype, s.device),
                thinking=s.thinking,
            )
        layer = self.settings.layer or max(1, self._backbone.num_layers // 2)
        tap = Tap(layer, self.settings.pooling)
        self._backbone.check([tap])
        return self._backbone, tap

    def _identity(self, database: sqlite3.Connection) -> tuple[str, str]:
        """Name and signature of the backbone; remembered by the place and date of its files, so
        that it need not load."""
        stamp = self._stamp()
        if stamp is not None:
            row = database.execute(
                "SELECT name, signature FROM backbone WHERE stamp = ?", (stamp,)
            ).fetchone()
            if row is not None:
                return row[0], row[1]
        backbone, tap = self.backbone()
        name, signature = backbone.name, backbone.signature(tap)
        # known now even if loading has fetched or converted the model
        stamp = self._stamp()
        if stamp is not None:
            database.execute(
                "INSERT OR REPLACE INTO backbone VALUES (?, ?, ?)", (stamp, name, signature)
            )
        return name, signature

    def _stamp(self) -> str | None:
        """Place and date of the backbone's files, with all that decides its signature beside
        them."""
        place = location_stamp(self.settings.backbone)
        if place is None:
            return None
        kind = dtype_of(self.settings.dtype, self.settings.device)
        parts = f"{place}|{self.settings.model_dump_json()}|{kind}|{PREPARATION}"
        return hashlib.sha256(parts.encode()).hexdigest()


class _Row(NamedTuple):
    """What is kept of a text: `Note`s, and the feature's bytes."""

    notes: int
    value: bytes

    @property
    def checksum(self) -> int:
        """By which a damaged row is known."""
        return zlib.crc32(self.value, self.notes)


def _prepare(database: sqlite3.Connection) -> None:
    """Write-ahead logging and the tables.

    SQLite does not wait for another connection that changes the journal's mode, whatever the
    timeout; so two processes that create the cache at once wait for each other here.
    """
    end = time.monotonic() + CREATING_SECONDS
    while True:
        try:
            database.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
    database.execute("PRAGMA synchronous=NORMAL")
    database.executescript(_SCHEMA)


def _key(signature: str, item: Item) -> bytes:
    turns = "\x1e".join(f"{m.role}\x1f{m.content}" for m in item.prompt)
    return hashlib.sha256(f"{signature}\x1d{turns}\x1d{item.response}".encode()).digest()


def _lookup(database: sqlite3.Connection, keys: set[bytes]) -> Iterator[tuple[bytes, _Row]]:
    """The rows that are there and whole."""
    wanted, damaged = sorted(keys), 0
    for at in range(0, len(wanted), 500):
        part = wanted[at : at + 500]
        marks = ",".join("?" * len(part))
        rows = database.execute(
            f"SELECT key, notes, checksum, value FROM text WHERE key IN ({marks})", part
        )
        for key, notes, checksum, value in rows:
            row = _Row(notes, value)
            whole = row.checksum == checksum and len(value) % 4 == 0
            if whole and np.isfinite(np.frombuffer(value, dtype="<f4")).all():
                yield key, row
            else:
                damaged += 1
    if damaged:
        logger.warning(
            "%d features in the cache are damaged and are computed anew; is the disk sound?",
            damaged,
        )
