"""Flower's SuperLink inside the server's own process, with its Fleet API alone on the network.

The state of the SuperLink, its Fleet API, the proof of a node's key and the message API are
Flower's. Its Control and Runtime APIs, with which whoever reaches them starts an app on every
machine, are not served at all: nodes are registered, the run is begun, and messages are exchanged
in this process.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import resource
import threading
import time
from asyncio import constants
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from fastapi import FastAPI
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SubStatus
from flwr.server.superlink.linkstate import InMemoryLinkState, LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedvpa.errors import BadInputError, RunError
from fedvpa.network.door import Door, Witness
from fedvpa.network.grid import Reply

logger = logging.getLogger("fedvpa")

START_SECONDS = 30.0
HEARTBEAT_SECONDS = 10.0
SILENT_SECONDS = 15.0
"""A connection on which no request has begun by then is closed."""
MOST_CONNECTIONS, MOST_FROM_ONE_ADDRESS = 2048, 512
"""Connections that are open at the same time; a client has two."""


class Prompt(H11Protocol):
    """uvicorn's HTTP protocol, which waits for a first request for ever, with a limit to that."""

    _open: ClassVar[Counter[str]] = Counter()

    def connection_made(self, transport: Any) -> None:
        """A caller has come."""
        super().connection_made(transport)
        self._from = str((transport.get_extra_info("peername") or ("",))[0])
        self._open[self._from] += 1
        if self._open[self._from] > MOST_FROM_ONE_ADDRESS:
            transport.close()
        self.loop.call_later(SILENT_SECONDS, self._leave_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        """A caller has gone."""
        self._open[self._from] -= 1
        if not self._open[self._from]:
            del self._open[self._from]
        super().connection_lost(exc)

    def _leave_if_silent(self) -> None:
        if self.scope is None and not self.transport.is_closing():
            self.transport.close()


class NamedByKey(InMemoryLinkState):
    """Flower's state, with nodes that have the same number whenever the server is started: clients
    remember by these numbers whose sums they have helped to open."""

    def create_node(
        self, owner_aid: str, owner_name: str, public_key: bytes, heartbeat_interval: float,
        *, location: str | None = None, name: str | None = None,
    ) -> int:  # fmt: skip
        """Register a node; its number is a hash of its key."""
        drawn: int = super().create_node(
            owner_aid, owner_name, public_key, heartbeat_interval, location=location, name=name
        )
        number = int.from_bytes(hashlib.sha256(public_key).digest()[:8], "big") >> 1
        with self.lock:
            node = self.nodes.pop(drawn)
            node.node_id = number
            self.nodes[number] = node
            self.node_public_key_to_node_id[public_key] = number
            self.owner_to_node_ids[owner_aid] ^= {drawn, number}
        return number


@dataclass
class Link:
    """A SuperLink for one run.

    Args:
        keys: the clients' public keys (OpenSSH files' bytes) by name.
        largest: bytes of the largest reply.
    """

    keys: Mapping[str, bytes]
    largest: int
    nodes: dict[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    meant: dict[str, dict[int, int]] = field(default_factory=dict)
    _arriving: dict[str, str] = field(default_factory=dict)
    _objects: dict[str, list[str]] = field(default_factory=dict)
    _run: int = 0
    _task: int = 0
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        objects = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
        manager = NoOpFederationManager()
        self._factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, manager, objects)
        self._factory.state_instance = NamedByKey(manager, objects.store())
        state = self.state
        known = dict[bytes, str]()
        for name, key in self.keys.items():
            public = public_pem(key, name)
            if public in known:
                raise BadInputError(
                    f"keys/{name}.pub: the key of {known[public]} again; every client needs its own"
                )
            known[public] = name
            self.nodes[name] = state.create_node(
                NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public, 0, name=name
            )
        self._run = state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        (run,) = state.get_run_info(run_ids=[self._run])
        self._task = int(run.primary_task_id or 0)
        if not (state.claim_task(self._task) and state.activate_task(self._task)):
            raise RunError("this version of Flower does not let a run begin in its own process")
        TaskIdentity.run_id, TaskIdentity.task_id = self._run, self._task
        TaskIdentity.node_id = state.get_node_id()
        self._door = Door(self._application(), frozenset(known), 2 * self.largest)

    @property
    def state(self) -> NamedByKey:
        """Flower's state of nodes, messages and objects."""
        found = self._factory.state()
        assert isinstance(found, NamedByKey)
        return found

    def _application(self) -> FastAPI:
        """The Fleet API: who signed it is proved first, then what is said is looked at."""
        witness = Witness(self.asked, self.meant, self.largest)
        app = FastAPI(
            docs_url=None, redoc_url=None, openapi_url=None,
            middleware=[
                Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
                Middleware(ProtobufTranslationMiddleware),
                Middleware(NodeAuthMiddleware),
                Middleware(BaseHTTPMiddleware, dispatch=witness.dispatch),
            ],
        )  # fmt: skip
        app.state.linkstate_factory = self._factory
        app.state.enable_supernode_auth = True
        app.include_router(fleet_router)
        return app

    @contextmanager
    def listening(self, host: str, port: int, certificate: Path, key: Path) -> Iterator[None]:
        """While this lasts, clients reach the Fleet API over TLS.

        Raises:
            RunError: the port cannot be listened on, or the certificate cannot be used.
        """
        server = uvicorn.Server(
            uvicorn.Config(
                self._door, host, port, http=Prompt, ws="none", lifespan="off", log_config=None,
                access_log=False, server_header=False, proxy_headers=False,
                limit_concurrency=MOST_CONNECTIONS, backlog=256, timeout_keep_alive=12,
                h11_max_incomplete_event_size=1 << 14, timeout_graceful_shutdown=2,
                ssl_certfile=str(certificate), ssl_keyfile=str(key),
            )
        )  # fmt: skip
        failed: list[str] = []

        def run() -> None:
            try:
                asyncio.run(server.serve())
            except (SystemExit, OSError) as error:  # uvicorn leaves by SystemExit
                failed.append(str(error))

        _raise_limits()
        thread = threading.Thread(target=run, name="fleet-api", daemon=True)
        self._thread = thread
        over = threading.Event()
        threading.Thread(target=self._stay_alive, args=(over,), daemon=True).start()
        thread.start()
        try:
            end = time.monotonic() + START_SECONDS
            while not server.started:
                if not thread.is_alive() or time.monotonic() > end:
                    why = "; ".join(failed) or "see server.log"
                    raise RunError(f"cannot listen on {host}:{port}: {why}")
                time.sleep(0.02)
            yield
        finally:
            over.set()
            self.state.finish_task(self._task, SubStatus.COMPLETED, "")
            server.should_exit = True
            thread.join(5)

    def _stay_alive(self, over: threading.Event) -> None:
        """Tell Flower that the run is going on."""
        while not over.wait(HEARTBEAT_SECONDS):
            self.state.acknowledge_task_heartbeat(self._task)

    def online(self) -> list[int]:
        """Nodes that are connected.

        Raises:
            RunError: nobody can be: the Fleet API is not served any longer.
        """
        if self._thread is not None and not self._thread.is_alive():
            raise RunError("clients are not listened to any longer; see server.log")
        return sorted(self.state.get_nodes(self._run))

    def push(self, messages: Iterable[Message]) -> list[str]:
        """Leave messages for their nodes; their ids ('': Flower does not take it)."""
        state, out = self.state, list[str]()
        with no_object_id_recompute():
            for message in messages:
                identity = message.object_id
                message.metadata.__dict__["_message_id"] = identity
                objects = {name: o.deflate() for name, o in get_all_nested_objects(message).items()}
                node = message.metadata.dst_node_id
                self.asked[identity], self._objects[identity] = node, list(objects)
                for name in objects:  # a part may belong to several messages
                    readers = self.meant.setdefault(name, {})
                    readers[node] = readers.get(node, 0) + 1
                session = state.start_session(self._run)  # it ends with the last part of a message
                stored, missing = state.store_message_and_object_tree(
                    remove_content_from_message(message), get_object_tree(message), session
                )
                for name in missing:
                    state.store_object(self._run, session, name, objects[name])
                out.append(identity if stored else "")
        return out

    def pull(self, messages: Iterable[str]) -> list[Reply]:
        """Replies that have arrived with all their parts; each is returned once."""
        wanted = [m for m in messages if m and m in self.asked and m not in self._arriving]
        out = []
        for reply in self._arrived(wanted):
            about = reply.metadata.reply_to_message_id
            if reply.has_error():  # Flower's own: the node is away, or the message has expired
                out.append(Reply(about, reply))
                self.forget([about])
            else:
                self._arriving[about] = reply.metadata.message_id
        for about, identity in list(self._arriving.items()):
            if (found := self._whole(about, identity)) is not None:
                out.append(found)
                self.forget([about])
        return out

    def _arrived(self, wanted: list[str]) -> Iterable[Message]:
        """Replies without their parts, and errors of Flower's own."""
        if not wanted:
            return ()
        try:
            replies: Iterable[Message] = self.state.get_message_res(set(wanted), self._run)
        except KeyError:  # one of them has expired in this moment, and Flower does not expect that
            return ()
        return replies

    def _whole(self, about: str, identity: str) -> Reply | None:
        """The reply, once all its parts are here."""
        store = self.state.object_store
        try:
            names = [
                node.object_id for node in iterate_object_tree(store.get_object_tree(identity))
            ]
            contents = {name: store.get(name) for name in names}
            if any(content == b"" for content in contents.values()):
                return None
            found = inflate_object_from_contents(identity, contents)
        except Exception as error:
            # a client chose these bytes: whatever they make Flower raise is the client's doing
            return Reply(about, None, type(error).__name__)
        if not isinstance(found, Message):
            return Reply(about, None, "no message")
        return Reply(about, found)

    def forget(self, messages: Iterable[str]) -> None:
        """Nothing more is waited for: drop these messages and what has arrived of their replies."""
        state, gone = self.state, list(messages)
        for about in gone:
            node = self.asked.pop(about, 0)
            for name in self._objects.pop(about, ()):
                readers = self.meant.get(name, {})
                readers[node] = readers.get(node, 0) - 1
                if readers[node] <= 0:
                    readers.pop(node)
                if not readers:
                    self.meant.pop(name, None)
            known = state.message_ins_id_to_message_res_id.get(about)
            if (identity := self._arriving.pop(about, known)) is not None:
                state.object_store.delete(identity)
            state.object_store.delete(about)
        state.delete_messages(set(gone))


def _raise_limits() -> None:
    """Files enough for all connections, and callers that begin TLS and do not end it are not waited
    for: asyncio's default is a minute, and uvicorn has no setting."""
    constants.SSL_HANDSHAKE_TIMEOUT = SILENT_SECONDS
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * MOST_CONNECTIONS
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, most) if most > 0 else wanted, most))


def public_pem(key: bytes, name: str) -> bytes:
    """The key of an OpenSSH file in the form that Flower compares.

    Raises:
        BadInputError: naming the client; the file holds no elliptic-curve key.
    """
    try:
        found = load_ssh_public_key(key)
    except ValueError as error:
        raise BadInputError(f"keys/{name}.pub: not an OpenSSH public key") from error
    if not isinstance(found, ec.EllipticCurvePublicKey):
        raise BadInputError(
            f"keys/{name}.pub: not an elliptic-curve key; `ssh-keygen -t ecdsa -b 384` makes one"
        )
    return public_key_to_bytes(found)
