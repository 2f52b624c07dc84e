"""The door of a federation's server: what of the network reaches Flower's Fleet API.

Flower 1.42 serves the Fleet, Control and Runtime APIs as one application, reads a request's body
before it looks who sent it, and sets no limit to the body. Here the Fleet API alone is served, a
request is let in by its headers before any of its body is read, and what a client may send is
bounded. `Door` stands in front of the application, `Witness` behind the parser of its bodies.
"""

from __future__ import annotations

import asyncio
import logging
import time
from base64 import b64decode
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fastapi import HTTPException
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import is_valid_sha256_hash
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

logger = logging.getLogger("fedvpa")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PREFIX = "/v1/fleet/"
PATHS = frozenset(
    PREFIX + name
    for name in (
        "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages",
        "push-object", "pull-object", "confirm-message-received",
    )
)  # fmt: skip
"""Of the Fleet API, what a client of ours calls: no node registers itself, no app is handed out."""
BODY_SECONDS = 60.0
"""A body that has not arrived by then is not waited for."""
AT_ONCE = 4
"""Requests of one client that are served at the same time."""
A_SECOND = 200.0
"""Requests of one client per second, in the long run; so many may come at once."""
MOST_OBJECTS = 16
"""Parts of one reply; ours have eight at the most."""
SMALL_BODY = 1 << 16
"""Bytes of a request that carries no part of a reply."""


class Closed(Exception):  # noqa: N818 - not an error of ours
    """A request is not let in."""

    def __init__(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason
        super().__init__(reason)


@dataclass
class Visits:
    """What one client has going on: requests now, and how many more it may send."""

    now: int = 0
    left: float = A_SECOND
    since: float = field(default_factory=time.monotonic)

    def come(self) -> None:
        """One more request.

        Raises:
            Closed: too many at once, or too often.
        """
        at = time.monotonic()
        self.left = min(A_SECOND, self.left + (at - self.since) * A_SECOND)
        self.since = at
        if self.now >= AT_ONCE or self.left < 1:
            raise Closed(429, "too many requests")
        self.left -= 1
        self.now += 1


class Door:
    """An ASGI application that lets registered clients through to another one.

    Args:
        inner: the application behind.
        keys: public keys (PEM) of those who may enter.
        largest: bytes of the largest body.
    """

    def __init__(self, inner: App, keys: frozenset[bytes], largest: int) -> None:
        self._inner, self._keys, self._largest = inner, keys, largest
        self._visits: dict[bytes, Visits] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or turn it away without reading its body."""
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
            return
        try:
            if scope["type"] != "http" or scope["path"] not in PATHS or scope["method"] != "POST":
                raise Closed(404, "not here")
            headers = {k.decode("latin-1").lower(): v for k, v in scope["headers"]}
            key = self._caller(headers)
            visits = self._visits.setdefault(key, Visits())
            visits.come()
            try:
                body = await self._body(headers, scope["path"], receive)
                await self._inner(scope, _once(body), send)
            finally:
                visits.now -= 1
        except Closed as closed:
            # whatever of the body is still on its way is not read
            answer = JSONResponse({"detail": closed.reason}, closed.status, {"connection": "close"})
            await answer(scope, receive, send)

    def _caller(self, headers: Mapping[str, bytes]) -> bytes:
        """The public key of who signed the headers.

        Raises:
            Closed: nobody who is registered, or not now.
        """
        try:
            key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.lower()], validate=True)
            stamp = headers[TIMESTAMP_HEADER.lower()].decode("ascii")
            signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER.lower()], validate=True)
            age = (now() - datetime.fromisoformat(stamp)).total_seconds()
            fresh = -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
            known = key in self._keys and fresh  # a stranger costs no arithmetic on curves
            if known and verify_signature(bytes_to_public_key(key), stamp.encode(), signature):
                return key
        except (KeyError, ValueError, TypeError) as error:  # binascii and unicode errors are values
            raise Closed(401, "not signed by a registered key") from error
        raise Closed(401, "not signed by a registered key")

    async def _body(self, headers: Mapping[str, bytes], path: str, receive: Receive) -> bytes:
        """All of the body.

        Raises:
            Closed: too large, too slow, or broken off.
        """
        most = self._largest if path == PREFIX + "push-object" else SMALL_BODY
        announced = headers.get("content-length", b"0")
        if not announced.isdigit() or int(announced) > most:
            raise Closed(413, "too large")
        parts, size, more = list[bytes](), 0, True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        raise Closed(400, "broken off")
                    parts.append(event.get("body", b""))
                    size += len(parts[-1])
                    more = event.get("more_body", False)
                    if size > most:
                        raise Closed(413, "too large")
        except TimeoutError as error:
            raise Closed(408, "too slow") from error
        return b"".join(parts)


def _once(body: bytes) -> Receive:
    """A body that has been read already, for the application behind."""
    events = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> MutableMapping[str, Any]:
        if events:
            return events.pop()
        await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    return receive


@dataclass
class Answer:
    """What a client has announced as its reply to one message: its parts, and how much of them has
    come."""

    about: str
    identity: str
    parts: frozenset[str]
    size: int = 0


@dataclass
class Witness:
    """Checks what a registered client says in a request that Flower takes its word for.

    Flower proves who sent a request, not that the message in it is the sender's own answer to
    something it was asked, nor that an object that it reads was meant for it.

    Args:
        asked: by message, the node that it was sent to, while its answer is awaited.
        meant: by part of a message, the nodes that it was sent to.
        largest: bytes of one reply in all.
    """

    asked: Mapping[str, int]
    meant: Mapping[str, Mapping[int, int]]
    largest: int
    _answers: dict[int, Answer] = field(default_factory=dict)

    async def dispatch(
        self, request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """A Starlette middleware's function.

        Raises:
            HTTPException: the message is another client's, an answer to nothing, or too large.
        """
        said = getattr(request.state, "protobuf_request", None)
        if isinstance(said, PushMessagesRequest):
            self._check_reply(said)
        elif isinstance(said, PushObjectRequest):
            self._check_part(said)
        elif isinstance(said, PullObjectRequest):
            if said.node.node_id not in self.meant.get(said.object_id, ()):
                raise HTTPException(403, "not meant for this client")
        elif isinstance(said, ConfirmMessageReceivedRequest) and (
            self.asked.get(said.message_object_id) != said.node.node_id
        ):
            raise HTTPException(403, "not yours")
        return await call_next(request)

    def _check_reply(self, said: PushMessagesRequest) -> None:
        node = said.node.node_id
        if len(said.messages_list) != 1 or len(said.message_object_trees) != 1:
            raise HTTPException(400, "one reply at a time")
        metadata, tree = said.messages_list[0].metadata, said.message_object_trees[0]
        about = metadata.reply_to_message_id
        if metadata.src_node_id != node or self.asked.get(about) != node:
            raise HTTPException(403, "not an answer to what this client was asked")
        parts = _parts(tree)
        if tree.object_id != metadata.message_id or len(parts) > MOST_OBJECTS:
            raise HTTPException(413, "too many parts")
        if not all(is_valid_sha256_hash(part) for part in parts):
            raise HTTPException(400, "parts without a name")
        found = Answer(about, tree.object_id, frozenset(parts))
        before = self._answers.get(node)
        if before is None or before.about != about:
            self._answers[node] = found
        elif (before.identity, before.parts) != (found.identity, found.parts):
            raise HTTPException(409, "answered already")

    def _check_part(self, said: PushObjectRequest) -> None:
        answer = self._answers.get(said.node.node_id)
        if answer is None or said.object_id not in answer.parts:
            raise HTTPException(403, "not a part of this client's answer")
        answer.size += len(said.object_content)
        if answer.size > 2 * self.largest:  # a part may be sent again
            raise HTTPException(413, "too large")


def _parts(tree: ObjectTree) -> list[str]:
    """Names of the objects of a tree, of a few more than `MOST_OBJECTS` at the most."""
    found, left = list[str](), [tree]
    while left and len(found) <= MOST_OBJECTS:
        node = left.pop()
        found.append(node.object_id)
        left.extend(node.children)
    return found
