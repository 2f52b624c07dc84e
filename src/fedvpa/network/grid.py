"""Blobs over Flower's message API, with waits of our own.

`Grid.send_and_receive` looks for replies every three seconds and waits for the last one; here it is
ten times a second, a round may go on without the last, and a node that loses its message (one that
reconnects does, silently) costs `timeout` seconds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from jaxtyping import Float
from torch import Tensor

from fedvpa.network.secure import secure_sum
from fedvpa.network.settings import ServerSettings

POLL_SECONDS = 0.1
RECORD = "fedvpa"


@dataclass
class GridTransport:
    """Nodes of a SuperLink."""

    grid: Grid
    settings: ServerSettings

    def nodes(self) -> list[int]:
        """Nodes that are connected."""
        return sorted(self.grid.get_node_ids())

    def ask(self, blobs: Mapping[int, bytes], enough: int) -> dict[int, bytes | str]:
        """Replies by node: a blob, or why there is none."""
        contents = {
            node: RecordDict({RECORD: ConfigRecord({"blob": blob})}) for node, blob in blobs.items()
        }
        out: dict[int, bytes | str] = {}
        for node, reply in self.exchange(contents, "query", enough).items():
            if isinstance(reply, str):
                out[node] = reply
                continue
            blob = (
                reply.config_records[RECORD].get("blob") if RECORD in reply.config_records else None
            )
            out[node] = blob if isinstance(blob, bytes) else "the reply holds no blob"
        return out

    def ask_sum(
        self, blobs: Mapping[int, bytes], size: int, least: int
    ) -> tuple[list[int], Float[Tensor, "n"]]:
        """Who took part, and the secure sum of the vectors (entries within -1 and 1) that they
        answered with."""
        contents = {
            node: RecordDict({RECORD: ConfigRecord({"blob": blob})}) for node, blob in blobs.items()
        }
        return secure_sum(
            contents, size, lambda messages: self.exchange(messages, "train", len(messages)), least
        )

    def exchange(
        self, contents: Mapping[int, RecordDict], kind: str, enough: int
    ) -> dict[int, RecordDict | str]:
        """Send a message to each node; what came back, or why nothing did."""
        messages = [
            Message(content, node, kind, ttl=2 * self.settings.timeout)
            for node, content in contents.items()
        ]
        node_of = dict(zip(self.grid.push_messages(messages), contents))
        end = time.monotonic() + self.settings.timeout
        out: dict[int, RecordDict | str] = {}
        waiting, good = set(node_of), 0
        while waiting and time.monotonic() < end:
            for reply in self.grid.pull_messages(waiting):
                identity = reply.metadata.reply_to_message_id
                if identity not in waiting:
                    continue
                waiting.discard(identity)
                if reply.has_error():
                    out[node_of[identity]] = f"error {reply.error.code}: {reply.error.reason}"
                    continue
                out[node_of[identity]] = reply.content
                good += 1
                if good == enough:
                    end = min(end, time.monotonic() + self.settings.grace)
            if waiting:
                time.sleep(POLL_SECONDS)
        return out | {node_of[i]: f"no reply within {self.settings.timeout:.0f} s" for i in waiting}
