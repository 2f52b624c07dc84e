"""Blobs over Flower's message API, with waits of our own.

`Grid.send_and_receive` looks for replies every three seconds and waits for the last one; here it is
ten times a second, a round may go on without the last, and a node that loses its message (one that
reconnects does, silently) costs `timeout` seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedvpa.network.codes import REASONS
from fedvpa.network.records import Broken
from fedvpa.network.secure import Summed, secure_sum
from fedvpa.network.settings import ServerSettings
from fedvpa.network.wire import RECORD

logger = logging.getLogger("fedvpa")

POLL_SECONDS = 0.05


@dataclass
class Reply:
    """What came back for a message: Flower's message, or how it failed to be one."""

    about: str
    message: Message | None
    broken: str = ""


@runtime_checkable
class Post(Protocol):
    """Carries Flower's messages to nodes and their replies back."""

    def online(self) -> list[int]:
        """Nodes that are connected."""
        ...

    def push(self, messages: Iterable[Message]) -> list[str]:
        """Leave messages for their nodes; their ids, in order ('': not taken)."""
        ...

    def pull(self, messages: Iterable[str]) -> list[Reply]:
        """Replies to these that have arrived since the last call."""
        ...

    def forget(self, messages: Iterable[str]) -> None:
        """No reply to these is waited for any longer."""
        ...


@dataclass
class GridPost:
    """A SuperLink that somebody else runs, reached by a ServerApp's grid."""

    grid: Grid

    def online(self) -> list[int]:
        """Nodes that are connected."""
        return sorted(self.grid.get_node_ids())

    def push(self, messages: Iterable[Message]) -> list[str]:
        """Leave messages for their nodes."""
        return [identity or "" for identity in self.grid.push_messages(messages)]

    def pull(self, messages: Iterable[str]) -> list[Reply]:
        """Replies that have arrived."""
        wanted = list(messages)
        try:
            found = list(self.grid.pull_messages(wanted))
        except Exception as error:
            # Flower reads all replies at once, and takes them from the SuperLink before: one that
            # cannot be read loses those that came with it, and nobody knows whose it was
            logger.warning("a reply cannot be read (%s); waiting for others", type(error).__name__)
            return []
        return [Reply(reply.metadata.reply_to_message_id, reply) for reply in found]

    def forget(self, messages: Iterable[str]) -> None:
        """Flower drops them when they expire."""


@dataclass
class FlowerTransport:
    """Asks nodes over a post."""

    post: Post
    settings: ServerSettings

    def nodes(self) -> list[int]:
        """Nodes that are connected."""
        return self.post.online()

    def ask(
        self, blobs: Mapping[int, bytes], enough: int, seconds: float | None = None
    ) -> dict[int, bytes | str | Broken]:
        """Replies by node: a blob, why there is none, or how it is broken."""
        out: dict[int, bytes | str | Broken] = {}
        for node, reply in self.exchange(_contents(blobs), "query", enough, seconds).items():
            if not isinstance(reply, RecordDict):
                out[node] = reply
                continue
            records = reply.config_records
            blob = records[RECORD].get("blob") if RECORD in records else None
            out[node] = blob if isinstance(blob, bytes) else Broken("no blob")
        return out

    def ask_sum(self, blobs: Mapping[int, bytes], size: int, least: int) -> Summed:
        """The secure sum of the vectors (entries within -1 and 1) that nodes answer with."""
        return secure_sum(
            _contents(blobs),
            size,
            lambda messages: self.exchange(messages, "train", len(messages)),
            least,
        )

    def exchange(
        self,
        contents: Mapping[int, RecordDict],
        kind: str,
        enough: int,
        seconds: float | None = None,
    ) -> dict[int, RecordDict | str | Broken]:
        """Send a message to each node; what came back, or why nothing did."""
        messages = [
            Message(content, node, kind, ttl=2 * self.settings.timeout)
            for node, content in contents.items()
        ]
        node_of = dict(zip(self.post.push(messages), contents))
        node_of.pop("", None)
        patience = min(self.settings.timeout, seconds or self.settings.timeout)
        begun = time.monotonic()
        end = begun + patience
        out: dict[int, RecordDict | str | Broken] = {}
        waiting, good = set(node_of), 0
        while waiting and time.monotonic() < end:
            for reply in self.post.pull(waiting):
                if reply.about not in waiting:
                    continue
                waiting.discard(reply.about)
                found = _read(reply)
                out[node_of[reply.about]] = found
                good += isinstance(found, RecordDict)
                if good == enough:
                    end = min(end, time.monotonic() + self.settings.grace)
            if waiting:
                time.sleep(POLL_SECONDS)
        self.post.forget(waiting)
        lost = f"no reply within {time.monotonic() - begun:.1f} s"
        return dict.fromkeys(contents, lost) | out


def _contents(blobs: Mapping[int, bytes]) -> dict[int, RecordDict]:
    return {
        node: RecordDict({RECORD: ConfigRecord({"blob": blob})}) for node, blob in blobs.items()
    }


def _read(reply: Reply) -> RecordDict | str | Broken:
    """What a reply holds. The text of an error may be anybody's: only our codes are repeated."""
    if reply.message is None:
        return Broken(reply.broken)
    if reply.message.has_error():
        error = reply.message.error
        return REASONS.get(str(error.reason), f"error {int(error.code)} of Flower")
    return reply.message.content
