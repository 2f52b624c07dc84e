"""The server's database: nothing acknowledged is lost, whoever else writes; on SQLite and on
PostgreSQL."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sqlalchemy import Connection, create_engine, text

from fedvpa.errors import BadInputError, RunError
from fedvpa.serving.access import Access, DeniedError, checked_id, new_key
from fedvpa.serving.questions import information
from fedvpa.serving.settings import ServingSettings
from fedvpa.serving.store import MIGRATIONS, VERSION, Comparison, Store

WRITER = """
import sys, torch
from fedvpa.serving.store import Comparison, Store
store = Store(sys.argv[1])
for i in range(int(sys.argv[3])):
    done = store.add("ann", Comparison(f"{sys.argv[2]}-{i}", "s", True, torch.ones(2, 3)), 10_000)
    print(f"{sys.argv[2]}-{i}", flush=True)
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'users.db'}"
        return
    base, name = request.getfixturevalue("postgresql"), f"fedvpa_{uuid.uuid4().hex}"
    server = create_engine(
        base.replace("postgresql://", "postgresql+psycopg://"), isolation_level="AUTOCOMMIT"
    )
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield base.replace("/postgres?", f"/{name}?")
    with server.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store(url)
    yield opened
    opened.close()


def compared(digest: str, value: float = 1.0, **more: object) -> Comparison:
    return Comparison(digest, "backbone", True, torch.full((2, 3), value), **more)  # type: ignore[arg-type]


def test_comparisons_come_back_as_they_were(store: Store) -> None:
    texts = {"messages": [{"role": "user", "content": "tëa 🍵"}], "chosen": "a", "rejected": "b"}
    assert store.comparisons("ann") == []
    assert store.add("ann", compared("one", texts=texts), 3)
    assert not store.add("ann", compared("one"), 3)
    assert store.add("bob", compared("one", 2.0), 3)
    assert store.add("ann", compared("two", 5.0), 3)
    first, second = store.comparisons("ann")
    assert first.texts == texts
    assert second.texts is None
    assert torch.equal(second.features, torch.full((2, 3), 5.0))
    assert (first.digest, first.signature, first.first) == ("one", "backbone", True)
    before = store.state("ann")
    assert store.add("ann", compared("two", 7.0), 3)  # the other way round
    assert store.state("ann") != before
    assert len(store.comparisons("ann")) == 2
    store.replace(first.id, torch.zeros(2, 3), "another")
    assert store.comparisons("ann")[0].signature == "another"
    assert store.add("ann", compared("three"), 3)
    with pytest.raises(BadInputError, match="3 comparisons are kept of a user"):
        store.add("ann", compared("four"), 3)
    assert store.take_back("ann")
    assert store.take_back("ann", first.id)
    assert not store.take_back("bob", first.id)
    assert [c.digest for c in store.comparisons("ann")] == ["two"]


def test_forgetting_leaves_nothing(store: Store, url: str, tmp_path: Path) -> None:
    texts = {"messages": [], "chosen": "a very private answer", "rejected": "b"}
    store.add("ann", compared("one", texts=texts), 9)
    store.save("ann", "monday", "run", [1.0])
    store.add("bob", compared("one"), 9)
    assert store.forget("ann")
    assert not store.forget("ann")
    assert store.comparisons("ann") == []
    assert store.saved("ann") == {}
    assert len(store.comparisons("bob")) == 1
    for file in tmp_path.glob("users.db*"):
        assert b"very private" not in file.read_bytes()


def test_saved_preferences_are_replaced_and_removed(store: Store) -> None:
    store.save("ann", "monday", "run", [1.0, 2.0])
    store.save("ann", "monday", "other", [3.0])
    assert store.saved("ann") == {"monday": ("other", [3.0])}
    assert store.unsave("ann", "monday")
    assert not store.unsave("ann", "monday")


def test_processes_that_write_at_once_lose_nothing(store: Store, url: str) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, url, str(k), "15"], stdout=subprocess.PIPE)
        for k in range(3)
    ]
    said = [line for w in writers for line in w.communicate()[0].decode().split()]
    assert all(w.returncode == 0 for w in writers)
    assert len(said) == 45
    assert {c.digest for c in store.comparisons("ann")} == set(said)


def test_a_killed_process_loses_nothing_that_it_has_said(store: Store, url: str) -> None:
    command = [sys.executable, "-c", WRITER, url, "k", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline().decode().strip() for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
        said += writer.stdout.read().decode().split()
    kept = {c.digest for c in store.comparisons("ann")}
    # the last line may have been cut off
    assert set(said[:-1]) <= kept
    assert store.add("ann", compared("after"), 1_000_000)


def test_a_database_of_another_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "users.db"
    Store(f"sqlite:///{file}").close()
    with sqlite3.connect(file) as database:
        database.execute("UPDATE fedvpa_meta SET value = ?", (str(VERSION + 1),))
    database.close()
    before = file.read_bytes()
    with pytest.raises(BadInputError, match=f"version {VERSION + 1}, and this fedvpa reads up to"):
        Store(f"sqlite:///{file}")
    assert file.read_bytes() == before


def test_an_older_database_is_brought_up_to_date(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add("ann", compared("one"), 9)

    def second(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE fedvpa_new (id INTEGER)"))

    monkeypatch.setattr("fedvpa.serving.store.VERSION", VERSION + 1)
    monkeypatch.setitem(MIGRATIONS, VERSION + 1, second)
    for _ in range(2):  # the second time there is nothing to do
        newer = Store(url)
        assert [c.digest for c in newer.comparisons("ann")] == ["one"]
        newer.close()
    monkeypatch.undo()
    with pytest.raises(BadInputError, match=f"of version {VERSION + 1}"):
        Store(url)


@pytest.mark.parametrize("bad", ["users.db", "mongodb://x/y", "", "sqlite:///no/such/folder/u.db"])
def test_what_is_no_database(bad: str) -> None:
    with pytest.raises((BadInputError, RunError), match=r"--store|database cannot be used"):
        Store(bad)


def test_keys_are_kept_as_hashes(store: Store) -> None:
    secret, row = new_key(store, "user", "ann")
    assert secret.startswith("fv-")
    assert secret not in str(vars(row))
    access = Access(store, True, 600.0)
    caller = access.caller(f"Bearer {secret}")
    assert (caller.scope, caller.user) == ("user", "ann")
    assert caller.of_user("ann") == "ann"
    with pytest.raises(DeniedError, match="not for user 'bob'"):
        caller.of_user("bob")
    for wrong in (None, "", "Bearer ", f"Bearer {secret}x", f"Basic {secret}"):
        with pytest.raises(DeniedError, match="no valid key"):
            access.caller(wrong)
    assert store.revoke(row.id)
    assert not store.revoke(row.id)
    with pytest.raises(DeniedError, match="no valid key"):
        access.caller(f"Bearer {secret}")
    for scope, user in (("root", None), ("user", None), ("chat", "ann"), ("user", "a/b")):
        with pytest.raises(BadInputError):
            new_key(store, scope, user)
    with pytest.raises(BadInputError, match="1 to 128 printable"):
        checked_id("x" * 129)


def test_information_is_what_an_answer_tells() -> None:
    margin = torch.tensor([[4.0, 0.0, 9.0], [-4.0, 0.0, 9.0]])
    even = information(margin, torch.tensor([0.5, 0.5]))
    p = torch.sigmoid(torch.tensor(4.0))
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    assert even[0] == pytest.approx(float(torch.tensor(2.0).log() - entropy), abs=1e-5)
    assert even[1] == pytest.approx(0, abs=1e-6)
    assert even[2] == pytest.approx(0, abs=1e-3)
    assert information(margin, torch.tensor([1.0, 0.0])).abs().max() < 1e-6


def test_passwords_are_not_shown() -> None:
    settings = ServingSettings(directory="d", store="postgresql://me:hush@host/db")
    assert settings.shown_url == "postgresql://me:***@host/db"
