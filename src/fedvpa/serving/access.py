"""Who may ask for what, and how often.

A key's secret is shown once, when it is made; the database holds its SHA-256 hash (the secret has
256 random bits, so that a slow hash would protect nothing more).
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from fedvpa.errors import BadInputError
from fedvpa.serving.settings import SCOPES, Scope
from fedvpa.serving.store import LONGEST_ID, KeyRow, Store

PREFIX = "fv-"
MOST_BUCKETS = 10_000


class DeniedError(Exception):
    """A request is refused: HTTP status, OpenAI's code, and a sentence; seconds to wait, if any."""

    def __init__(self, status: int, code: str, why: str, wait: float = 0.0) -> None:
        self.status, self.code, self.wait = status, code, wait
        super().__init__(why)


@dataclass(frozen=True)
class Caller:
    """Who asks: a key's id ('' where no keys are needed), what it may do, and its one user."""

    key: str
    scope: Scope
    user: str | None = None

    def of_user(self, user: str) -> str:
        """The user, if the caller may act for it.

        Raises:
            DeniedError: it may not.
        """
        if self.scope == "admin" or (self.scope == "user" and self.user == user):
            return user
        raise DeniedError(403, "forbidden", f"this key is not for user '{user}'")


def new_key(store: Store, scope: str, user: str | None = None) -> tuple[str, KeyRow]:
    """Make a key: its secret, which is kept nowhere, and what is kept.

    Raises:
        BadInputError: no such scope, or a user where there is none to be, or none where one is.
    """
    if scope not in SCOPES:
        raise BadInputError(f"scope '{scope}' (known: {', '.join(SCOPES)})")
    if (scope == "user") != (user is not None):
        raise BadInputError("a key of scope user is for one user, --user ID; others are for none")
    if user is not None:
        checked_id(user)
    secret = PREFIX + secrets.token_urlsafe(32)
    row = KeyRow(secrets.token_hex(4), _hash(secret), scope, user, time.time())
    store.add_key(row)
    return secret, row


def checked_id(user: str) -> str:
    """The id of a user, if it can be one.

    Raises:
        BadInputError: empty, too long, or with characters that no id has.
    """
    if not user or len(user) > LONGEST_ID or not user.isprintable() or "/" in user:
        raise BadInputError(f"a user's id has 1 to {LONGEST_ID} printable characters, and no slash")
    return user


class Access:
    """Recognises callers, and counts what they ask for.

    Args:
        store: holds the keys.
        open_: whether requests without a key are an administrator's, as long as no key exists.
        rate: requests per key and minute.
    """

    def __init__(self, store: Store, open_: bool, rate: float) -> None:
        self._store, self._rate = store, rate
        self._open = open_ and not store.keys()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def caller(self, authorization: str | None) -> Caller:
        """Who sent this header.

        Raises:
            DeniedError: 401 without a key, or with one that is none; 429 for too many requests.
        """
        secret = (authorization or "").removeprefix("Bearer ").strip()
        row = self._store.key_of(_hash(secret)) if secret else None
        if row is None:
            # once there has been a key, it stays closed: the last one may have been revoked
            self._open = self._open and not self._store.keys()
            if self._open:
                return Caller("", "admin")
            raise DeniedError(
                401, "invalid_api_key", "no valid key; send 'Authorization: Bearer KEY' (`fedvpa"
                " keys add` makes one)",
            )  # fmt: skip
        self._count(row.id)
        scope: Scope = row.scope  # type: ignore[assignment]
        return Caller(row.id, scope, row.user)

    def _count(self, key: str) -> None:
        """Take one from the key's bucket, which fills with time."""
        now, per_second = time.monotonic(), self._rate / 60
        most = max(1.0, self._rate / 6)  # a burst of ten seconds
        with self._lock:
            held, since = self._buckets.pop(key, (most, now))
            held = min(most, held + (now - since) * per_second)
            self._buckets[key] = (held - 1 if held >= 1 else held, now)
            while len(self._buckets) > MOST_BUCKETS:
                self._buckets.popitem(last=False)
        if held < 1:
            raise DeniedError(
                429, "rate_limit_exceeded", f"more than {self._rate:g} requests a minute",
                (1 - held) / per_second,
            )  # fmt: skip


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
