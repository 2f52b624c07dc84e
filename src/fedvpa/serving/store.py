"""The database: users' comparisons, the preferences that they have saved, and keys.

Comparisons are all that is known of a user; posteriors are computed from them, so that several
processes need not agree on anything else. Every change is one transaction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy import Float as Number
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from torch import Tensor

from fedvpa.errors import BadInputError, RunError

VERSION = 1
"""Version of the tables."""
PATIENCE = 10.0
"""Seconds for which a writer waits for another one (SQLite)."""
LOCK = 4_276_803
"""Number of the lock under which tables are made (PostgreSQL)."""
LONGEST_ID = 128

_tables = MetaData()
_meta = Table(
    "fedvpa_meta", _tables,
    Column("name", String(40), primary_key=True), Column("value", String(200), nullable=False),
)  # fmt: skip
_users = Table(
    "fedvpa_users", _tables,
    Column("id", String(LONGEST_ID), primary_key=True), Column("since", Number, nullable=False),
)  # fmt: skip
_comparisons = Table(
    "fedvpa_comparisons", _tables,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column(
        "user", String(LONGEST_ID), ForeignKey("fedvpa_users.id", ondelete="CASCADE"),
        nullable=False, index=True,
    ),
    Column("digest", String(64), nullable=False),
    Column("at", Number, nullable=False),
    Column("signature", String(200), nullable=False),
    Column("first", Boolean, nullable=False),
    Column("features", LargeBinary, nullable=False),
    Column("texts", JSON, nullable=True),
    UniqueConstraint("user", "digest"),
    sqlite_autoincrement=True,  # a number is never given twice: by it others notice changes
)  # fmt: skip
_saved = Table(
    "fedvpa_saved", _tables,
    Column(
        "user", String(LONGEST_ID), ForeignKey("fedvpa_users.id", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("name", String(LONGEST_ID), primary_key=True),
    Column("run", String(200), nullable=False), Column("z", JSON, nullable=False),
)  # fmt: skip
_keys = Table(
    "fedvpa_keys", _tables,
    Column("id", String(16), primary_key=True), Column("hash", String(64), unique=True),
    Column("scope", String(10), nullable=False), Column("user", String(LONGEST_ID)),
    Column("since", Number, nullable=False),
)  # fmt: skip

MIGRATIONS: dict[int, Callable[[Connection], None]] = {}
"""From the version before to each version; the first one makes all tables."""


@dataclass(frozen=True)
class Comparison:
    """One choice of a user: features [2, h] (chosen, rejected) by a backbone of this signature,
    whether the chosen response was shown first, a digest of what was compared, and the texts, where
    they are kept."""

    digest: str
    signature: str
    first: bool
    features: Float[Tensor, "2 h"]
    texts: dict[str, Any] | None = None
    id: int = 0
    at: float = 0.0


@dataclass(frozen=True)
class KeyRow:
    """A key: what it may do, for which user (scope `user`), and the hash of its secret."""

    id: str
    hash: str
    scope: str
    user: str | None
    since: float


class Store:
    """Access to a database.

    Args:
        url: as SQLAlchemy reads it: ``sqlite:///users.db``, ``postgresql://...``.

    Raises:
        BadInputError: no such kind of database, or one of another version; nothing was written.
        RunError: it cannot be reached.
    """

    def __init__(self, url: str) -> None:
        if url.startswith("postgresql://"):  # the driver that the extra brings
            url = f"postgresql+psycopg://{url.removeprefix('postgresql://')}"
        try:
            self._engine: Engine = create_engine(url, pool_pre_ping=True)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise BadInputError(
                f"--store: {type(error).__name__}; give sqlite:///FILE, or postgresql://USER@HOST/NAME"
                " (pip install 'fedvpa[serve]' brings its driver)"
            ) from error
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _on_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give back all connections."""
        self._engine.dispose()

    @contextmanager
    def _begin(self, reads: bool = False) -> Iterator[Connection]:
        """One transaction; one that only `reads` waits for no writer.

        Raises:
            RunError: the database refuses; its message is left out, as it may hold what was sent.
        """
        try:
            engine = self._engine.execution_options(reads=reads)
            with engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            raise RunError(f"the database cannot be used: {type(error).__name__}") from error

    def _prepare(self) -> None:
        with self._begin() as connection:
            if connection.dialect.name == "postgresql":  # one process at a time; SQLite's are
                connection.execute(select(func.pg_advisory_xact_lock(LOCK)))
            if not inspect(connection).has_table(_meta.name):
                _tables.create_all(connection)
                connection.execute(insert(_meta).values(name="version", value=str(VERSION)))
            found = connection.scalar(select(_meta.c.value).where(_meta.c.name == "version"))
            version = int(found or 0)
            if not 0 < version <= VERSION:
                raise BadInputError(
                    f"--store: the database is of version {version}, and this fedvpa reads up to"
                    f" {VERSION}; use the fedvpa that wrote it, or another database"
                )
            for number in range(version + 1, VERSION + 1):
                MIGRATIONS[number](connection)
            if version < VERSION:
                own = _meta.c.name == "version"
                connection.execute(update(_meta).where(own).values(value=str(VERSION)))

    # -- users

    def add(self, user: str, comparison: Comparison, most: int) -> bool:
        """Keep a comparison; False where this very one is kept already (an opposite answer to the
        same question takes its place).

        Raises:
            BadInputError: the user has as many as may be.
        """
        row = {
            "user": user, "digest": comparison.digest, "at": time.time(),
            "signature": comparison.signature, "first": comparison.first,
            "features": _packed(comparison.features), "texts": comparison.texts,
        }  # fmt: skip
        same = (_comparisons.c.user == user) & (_comparisons.c.digest == comparison.digest)
        for _ in range(3):  # another process may add the same at once
            try:
                with self._begin() as connection:
                    if not connection.scalar(select(_users.c.id).where(_users.c.id == user)):
                        connection.execute(insert(_users).values(id=user, since=time.time()))
                    old = connection.execute(select(_comparisons).where(same)).first()
                    if old is not None:
                        if old.features == row["features"]:
                            return False
                        connection.execute(delete(_comparisons).where(same))
                    held = select(func.count()).select_from(_comparisons)
                    if connection.scalar(held.where(_comparisons.c.user == user)) >= most:  # type: ignore[operator]
                        raise BadInputError(
                            f"{most} comparisons are kept of a user; take some back first"
                        )
                    connection.execute(insert(_comparisons).values(**row))
                    return True
            except IntegrityError:
                continue
        raise RunError("the database cannot be used: others write the same, again and again")

    def comparisons(self, user: str) -> list[Comparison]:
        """All of a user, oldest first."""
        with self._begin(reads=True) as connection:
            rows = connection.execute(
                select(_comparisons).where(_comparisons.c.user == user).order_by(_comparisons.c.id)
            ).all()
        return [
            Comparison(
                r.digest, r.signature, r.first, _unpacked(r.features), r.texts, r.id, r.at
            )
            for r in rows
        ]  # fmt: skip

    def state(self, user: str) -> tuple[int, int]:
        """How many comparisons of a user there are, and the latest one's number: as long as both
        are the same, so are all."""
        with self._begin(reads=True) as connection:
            count, last = connection.execute(
                select(func.count(), func.max(_comparisons.c.id)).where(_comparisons.c.user == user)
            ).one()
        return count, last or 0

    def replace(self, number: int, features: Float[Tensor, "2 h"], signature: str) -> None:
        """Features of a comparison that were read anew, by another backbone."""
        with self._begin() as connection:
            connection.execute(
                update(_comparisons).where(_comparisons.c.id == number)
                .values(features=_packed(features), signature=signature)
            )  # fmt: skip

    def take_back(self, user: str, number: int | None = None) -> bool:
        """Remove a comparison of a user (None: the latest); False where there is none."""
        mine = _comparisons.c.user == user
        with self._begin() as connection:
            if number is None:
                number = connection.scalar(select(func.max(_comparisons.c.id)).where(mine))
            done = connection.execute(
                delete(_comparisons).where(mine & (_comparisons.c.id == number))
            )
        self._erase()
        return done.rowcount > 0

    def forget(self, user: str) -> bool:
        """Remove all that is kept of a user; False where nothing was."""
        with self._begin() as connection:
            for table in (_comparisons, _saved):
                connection.execute(delete(table).where(table.c.user == user))
            done = connection.execute(delete(_users).where(_users.c.id == user))
        self._erase()
        return done.rowcount > 0

    def _erase(self) -> None:
        """Nothing deleted is left in SQLite's log (PostgreSQL's vacuum does so in its own time)."""
        if self._engine.dialect.name == "sqlite":
            connection = self._engine.raw_connection()
            try:
                connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                connection.close()

    def save(self, user: str, name: str, run: str, z: Sequence[float]) -> None:
        """Keep a preference under a name of the user's own."""
        mine = (_saved.c.user == user) & (_saved.c.name == name)
        with self._begin() as connection:
            if not connection.scalar(select(_users.c.id).where(_users.c.id == user)):
                connection.execute(insert(_users).values(id=user, since=time.time()))
            connection.execute(delete(_saved).where(mine))
            connection.execute(insert(_saved).values(user=user, name=name, run=run, z=list(z)))

    def saved(self, user: str) -> dict[str, tuple[str, list[float]]]:
        """Run and z of a user's saved preferences, by name."""
        with self._begin(reads=True) as connection:
            rows = connection.execute(select(_saved).where(_saved.c.user == user)).all()
        return {r.name: (r.run, r.z) for r in rows}

    def unsave(self, user: str, name: str) -> bool:
        """Remove a saved preference; False where there is none."""
        mine = (_saved.c.user == user) & (_saved.c.name == name)
        with self._begin() as connection:
            return connection.execute(delete(_saved).where(mine)).rowcount > 0

    # -- keys

    def add_key(self, key: KeyRow) -> None:
        """Keep a key."""
        with self._begin() as connection:
            connection.execute(insert(_keys).values(**vars(key)))

    def keys(self) -> list[KeyRow]:
        """All keys, oldest first."""
        with self._begin(reads=True) as connection:
            rows = connection.execute(select(_keys).order_by(_keys.c.since)).all()
        return [KeyRow(*row) for row in rows]

    def key_of(self, digest: str) -> KeyRow | None:
        """The key whose secret has this hash."""
        with self._begin(reads=True) as connection:
            row = connection.execute(select(_keys).where(_keys.c.hash == digest)).first()
        return None if row is None else KeyRow(*row)

    def revoke(self, key: str) -> bool:
        """Remove a key; False where there is none of that id."""
        with self._begin() as connection:
            return connection.execute(delete(_keys).where(_keys.c.id == key)).rowcount > 0


def _on_sqlite(connection: Any, _: Any) -> None:
    """Several processes: readers beside a writer, writers one after the other; what was committed
    is on the disk; deleted rows are overwritten."""
    connection.isolation_level = None  # transactions begin as said below
    for line in (
        f"busy_timeout={int(1000 * PATIENCE)}", "journal_mode=WAL", "synchronous=FULL",
        "foreign_keys=ON", "secure_delete=ON",
    ):  # fmt: skip
        connection.execute(f"PRAGMA {line}")


def _begin_sqlite(connection: Connection) -> None:
    # a transaction that reads first and then writes would not wait for another writer
    reads = connection.get_execution_options().get("reads")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _packed(features: Float[Tensor, "2 h"]) -> bytes:
    return features.float().numpy().astype("<f4").tobytes()


def _unpacked(content: bytes) -> Float[Tensor, "2 h"]:
    return torch.from_numpy(np.frombuffer(content, dtype="<f4").astype(np.float32)).view(2, -1)
