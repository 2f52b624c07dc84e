"""Features of texts, computed once: a content-addressed cache in SQLite, safe under several
processes and under kill -9.

A feature's key is a hash of everything that decides its value: weights, chat template, limits,
number type, layer, pooling and text. The backbone is loaded only if something is missing.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.config import FeaturesConfig
from fedvpa.errors import RunError
from fedvpa.features.backbone import Backbone, Tap
from fedvpa.features.loading import cache_home, location_stamp
from fedvpa.files import make_folder, private_file
from fedvpa.records import Item, Message, PreferencePair, Progress

CREATING_SECONDS = 60.0
"""How long to wait for another process that creates the cache."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS feature (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS backbone
  (stamp TEXT PRIMARY KEY, name TEXT NOT NULL, signature TEXT NOT NULL);
"""


@dataclass(frozen=True)
class FeatureTable:
    """Features [n, 2, H] of n pairs (chosen, rejected), and the backbone they come from."""

    values: Float[Tensor, "n 2 h"]
    backbone: str
    signature: str
    computed: int


class FeatureCache:
    """Features by content, in ``$FEDVPA_CACHE/features.sqlite``."""

    def __init__(self, settings: FeaturesConfig, path: Path | None = None) -> None:
        self.settings = settings
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
        values, name, signature, computed = self.items(items, progress)
        return FeatureTable(values.view(len(pairs), 2, -1), name, signature, computed)

    def identity(self) -> tuple[str, int]:
        """The backbone's signature, and the width of its features.

        Raises:
            BadInputError: the backbone cannot be loaded, or lacks the layer.
        """
        values, _, signature, _ = self.items([Item((Message("user", "."),), ".")])
        return signature, values.shape[-1]

    def items(
        self, items: Sequence[Item], progress: Progress | None = None
    ) -> tuple[Float[Tensor, "n h"], str, str, int]:
        """Features, the backbone's name and signature, and how many features had to be computed."""
        try:
            make_folder(self.path.parent)
            # readable for this user alone: it holds features of private texts
            private_file(self.path)
            with closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as database:
                _prepare(database)
                return self._items(database, items, progress)
        except sqlite3.Error as error:
            raise RunError(
                f"the feature cache {self.path} cannot be used: {error}; set FEDVPA_CACHE elsewhere"
            ) from error

    def _items(
        self, database: sqlite3.Connection, items: Sequence[Item], progress: Progress | None
    ) -> tuple[Float[Tensor, "n h"], str, str, int]:
        name, signature = self._identity(database)
        keys = [_key(signature, item) for item in items]
        found = dict(_lookup(database, set(keys)))
        missing: dict[bytes, Item] = {k: item for k, item in zip(keys, items) if k not in found}
        if missing:
            todo = list(missing)
            backbone, tap = self.backbone()

            def keep(index: list[int], block: Tensor) -> None:
                rows = [
                    (todo[i], block[j, 0].numpy().astype("<f4").tobytes())
                    for j, i in enumerate(index)
                ]
                database.execute("BEGIN IMMEDIATE")
                database.executemany("INSERT OR IGNORE INTO feature VALUES (?, ?)", rows)
                database.execute("COMMIT")
                found.update(rows)

            backbone.encode(list(missing.values()), [tap], on_batch=keep, progress=progress)
        table = (
            np.stack([np.frombuffer(found[k], dtype="<f4") for k in keys])
            if keys
            else np.zeros((0, 0), "<f4")
        )
        return torch.from_numpy(table.astype(np.float32)), name, signature, len(missing)

    def backbone(self) -> tuple[Backbone, Tap]:
        """The loaded model and where its features are read."""
        if self._backbone is None:
            s = self.settings
            self._backbone = Backbone(
                s.backbone,
                max_prompt_tokens=s.max_prompt_tokens,
                max_response_tokens=s.max_response_tokens,
                device=s.device,
                dtype=None if s.dtype == "auto" else getattr(torch, s.dtype),
            )
        layer = self.settings.layer or max(1, self._backbone.num_layers // 2)
        tap = Tap(layer, self.settings.pooling)
        self._backbone.check([tap])
        return self._backbone, tap

    def _identity(self, database: sqlite3.Connection) -> tuple[str, str]:
        """Name and signature of the backbone; remembered by the place and date of its files, so
        that it need not load."""
        stamp = location_stamp(self.settings.backbone)
        if stamp is not None:
            stamp = hashlib.sha256(
                f"{stamp}|{self.settings.model_dump_json()}".encode()
            ).hexdigest()
            row = database.execute(
                "SELECT name, signature FROM backbone WHERE stamp = ?", (stamp,)
            ).fetchone()
            if row is not None:
                return row[0], row[1]
        backbone, tap = self.backbone()
        name, signature = backbone.name, backbone.signature(tap)
        # known now even if loading has fetched or converted the model
        stamp = location_stamp(self.settings.backbone)
        if stamp is not None:
            stamp = hashlib.sha256(
                f"{stamp}|{self.settings.model_dump_json()}".encode()
            ).hexdigest()
            database.execute(
                "INSERT OR REPLACE INTO backbone VALUES (?, ?, ?)", (stamp, name, signature)
            )
        return name, signature


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


def _lookup(database: sqlite3.Connection, keys: set[bytes]) -> Iterable[tuple[bytes, bytes]]:
    wanted = sorted(keys)
    for at in range(0, len(wanted), 500):
        part = wanted[at : at + 500]
        marks = ",".join("?" * len(part))
        yield from database.execute(f"SELECT key, value FROM feature WHERE key IN ({marks})", part)
