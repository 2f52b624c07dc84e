"""``fedvpa serve`` and ``fedvpa keys``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fedvpa.console import Reporter, emit_json
from fedvpa.errors import BadInputError

if TYPE_CHECKING:
    from fedvpa.serving.store import Store


def run_serve(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Serve until told to stop."""
    with _extra():
        from fedvpa.serving.serve import serve
    serve(arguments.built, reporter.say, arguments.workers)
    return 0


def run_add(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Make a key."""
    with _opened(arguments.store) as store:
        from fedvpa.serving.access import new_key

        secret, row = new_key(store, arguments.scope, arguments.user)
    reporter.say(f"key {row.id} ({row.scope}{f' of {row.user}' if row.user else ''}), shown once:")
    print(secret)  # noqa: T201
    emit_json(arguments.json, {"id": row.id, "secret": secret, "scope": row.scope})
    return 0


def run_list(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """All keys."""
    with _opened(arguments.store) as store:
        rows = store.keys()
    reporter.table(
        f"{len(rows)} keys", ["id", "scope", "user", "since"],
        [(r.id, r.scope, r.user or "", time.strftime("%Y-%m-%d", time.gmtime(r.since)))
         for r in rows],
    )  # fmt: skip
    emit_json(
        arguments.json,
        [{"id": r.id, "scope": r.scope, "user": r.user, "since": r.since} for r in rows],
    )
    return 0


def run_revoke(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Remove a key."""
    with _opened(arguments.store) as store:
        done = store.revoke(arguments.key)
    if not done:
        raise BadInputError(f"{arguments.key}: no key of that id (`fedvpa keys list` shows them)")
    reporter.say(f"{arguments.key}: removed")
    return 0


@contextmanager
def _opened(url: str) -> Iterator[Store]:
    with _extra():
        from fedvpa.serving.store import Store
    store = Store(url)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise BadInputError(
            f"{error.name} is not installed: pip install 'fedvpa[serve]'"
        ) from error
