"""A client's connection with a SuperLink, by Flower's Fleet API.

Flower's own SuperNode fetches an app from the SuperLink for every run and executes it. This node
fetches none: a message is handed to a function of this process, and its answer goes back. So
nothing that a server sends is ever executed, there is no local port, and there are no processes to
start.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedvpa.errors import BadInputError
from fedvpa.foreign import harmless

logger = logging.getLogger("fedvpa")

HEARTBEAT_SECONDS = 10
"""How often a node says that it is there, the least that Flower takes; it counts as gone after two
intervals."""
LEAST_PAUSE, MOST_PAUSE = 0.2, 3.0
"""Seconds between looks for messages: a tenth of the time since the last message, within these."""
MOST_OBJECTS = 64
SHORT_PAUSES, LONG_PAUSES = (0.2, 0.5), (0.2, 0.5, 1.0, 2.0, 4.0)
"""Seconds before a request is repeated that did not arrive, or that the server asks to repeat. A
server that is started anew takes longer than the short ones: it has to be greeted again."""
BUSY = (429, 502, 503, 504)


class NotTakenError(Exception):
    """The server cannot be reached or does not take this node; the message says why."""


@dataclass
class Node:
    """A node of a SuperLink.

    Args:
        server: ``host:port`` of the SuperLink.
        authority: certificate authority (PEM) that the server's certificate is signed by.
        key: private key that the node proves itself with.
        answer: makes the reply to a message.
    """

    server: str
    authority: bytes
    key: ec.EllipticCurvePrivateKey
    answer: Callable[[Message], Message]
    on_connected: Callable[[], None] = lambda: None
    _stop: threading.Event = field(default_factory=threading.Event)

    def serve(self) -> None:
        """Answer what is asked, until the connection fails.

        Raises:
            NotTakenError: it has failed, or there was none.
        """
        try:
            with self._client() as client, self._active(client) as node:
                self.on_connected()
                heard = time.monotonic()
                while True:
                    if self._stop.is_set():
                        raise NotTakenError("the server does not know this node any more")
                    message = self._receive(client, node)
                    if message is not None:
                        self._send(client, node, self.answer(message))
                        heard = time.monotonic()
                    else:
                        idle = 0.1 * (time.monotonic() - heard)
                        time.sleep(min(MOST_PAUSE, max(LEAST_PAUSE, idle)))
        except (httpx.HTTPError, ValueError, RuntimeError) as error:
            raise NotTakenError(_why(error)) from error

    @contextmanager
    def _client(self) -> Iterator[FleetHttpClient]:
        signs = NodeAuthHttpInterceptor(self.key, self.key.public_key())
        client = FleetHttpClient.from_server_address(self.server, False, self.authority, [signs])
        client._client.follow_redirects = False  # signed headers are for this server alone
        with client:
            yield client

    @contextmanager
    def _active(self, client: FleetHttpClient) -> Iterator[NodeProto]:
        """The node, known to the server as being there, for as long as this lasts."""
        public = public_key_to_bytes(self.key.public_key())
        activated = client.ActivateNode(
            ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_SECONDS)
        )
        node, over = NodeProto(node_id=activated.node_id), threading.Event()
        self._stop.clear()

        def beat() -> None:
            while not over.wait(0.8 * HEARTBEAT_SECONDS):
                request = SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_SECONDS)
                try:
                    if not client.SendNodeHeartbeat(request).success:
                        self._stop.set()
                except (httpx.HTTPError, ValueError, RuntimeError):
                    continue  # the next request for messages fails as well, and says so

        threading.Thread(target=beat, name="heartbeat", daemon=True).start()
        try:
            yield node
        finally:
            over.set()
            try:
                client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
            except (httpx.HTTPError, ValueError, RuntimeError):
                logger.debug("the server could not be told that this node leaves")

    def _receive(self, client: FleetHttpClient, node: NodeProto) -> Message | None:
        """The next message with all its parts, if there is one.

        Raises:
            ValueError: it is not one that Flower can read.
        """
        response = _patiently(client.PullMessages, PullMessagesRequest(node=node))
        if not response.messages_list:
            return None
        envelope = message_from_proto(response.messages_list[0])
        identity, run = envelope.metadata.message_id, envelope.metadata.run_id
        try:
            contents = self._contents(client, node, run, response.message_object_trees[0])
            _patiently(
                client.ConfirmMessageReceived,
                ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=identity),
            )
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.UNAUTHORIZED:
                raise
            return None  # nobody waits for an answer any longer
        return _message(identity, contents)

    def _contents(
        self, client: FleetHttpClient, node: NodeProto, run: int, tree: ObjectTree
    ) -> dict[str, bytes]:
        names = [part.object_id for part in iterate_object_tree(tree)]
        if len(names) > MOST_OBJECTS:
            raise ValueError("a message of too many parts")
        found = {}
        for name in dict.fromkeys(names):
            wanted = PullObjectRequest(node=node, run_id=run, object_id=name)
            part = _patiently(client.PullObject, wanted)
            if not (part.object_found and part.object_available):
                raise ValueError("a message of which a part is missing")
            found[name] = part.object_content
        return found

    def _send(self, client: FleetHttpClient, node: NodeProto, reply: Message) -> None:
        """Send a reply; one that comes too late is dropped."""
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            parts: dict[str, Any] = get_all_nested_objects(reply)
            request = PushMessagesRequest(
                node=node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.0],
            )
            try:
                wanted = _patiently(client.PushMessages, request)
                for name in wanted.objects_to_push:
                    part = PushObjectRequest(
                        node=node, run_id=reply.metadata.run_id, session_id=wanted.session_id,
                        object_id=name, object_content=parts[name].deflate(),
                    )  # fmt: skip
                    _patiently(client.PushObject, part)
            except httpx.HTTPStatusError as error:
                if error.response.status_code == httpx.codes.UNAUTHORIZED:
                    raise
                logger.warning("an answer was not taken: %s", _why(error))


def _message(identity: str, contents: dict[str, bytes]) -> Message:
    """The message that these parts make.

    Raises:
        ValueError: they make none; whatever reading them raises is this error.
    """
    try:
        message = inflate_object_from_contents(identity, contents)
    except Exception as error:
        raise ValueError(f"a message that cannot be read ({type(error).__name__})") from error
    if not isinstance(message, Message):
        raise ValueError("a message that is none")  # noqa: TRY004 - the sender's mistake
    message.metadata.__dict__["_message_id"] = identity
    return message


def _patiently(call: Callable[[Any], Any], request: Any) -> Any:
    """The answer to a request, which is repeated if it did not arrive or came at a bad time.

    Raises:
        httpx.HTTPError: it fails all the same, or in another way.
    """
    failed, pauses = 0, tuple[float, ...]()
    while True:
        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            pauses = LONG_PAUSES if error.response.status_code in BUSY else ()
            if failed >= len(pauses):
                raise
        except httpx.TransportError:
            pauses = SHORT_PAUSES
            if failed >= len(pauses):
                raise
        time.sleep(pauses[failed])
        failed += 1


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key of an OpenSSH file.

    Raises:
        BadInputError: it is no elliptic-curve key.
    """
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise BadInputError(
            f"{path}: not an OpenSSH private key without a passphrase; make one with `ssh-keygen -t"
            ' ecdsa -b 384 -N ""`'
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadInputError(f"{path}: not an elliptic-curve key; use `ssh-keygen -t ecdsa -b 384`")
    return key


def _why(error: Exception) -> str:
    """What went wrong with a connection, in words."""
    if isinstance(error, httpx.HTTPStatusError):
        if error.response.status_code == httpx.codes.UNAUTHORIZED:
            return "the server does not know this client's key"
        said = FlowerError.from_json(error.response.text)
        if said and said.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            return "the server says that this client is connected already"
        return f"the server answered {error.response.status_code}"
    if isinstance(error, httpx.TransportError):
        return f"no connection ({harmless(error, 120)})"
    return harmless(error, 120)
