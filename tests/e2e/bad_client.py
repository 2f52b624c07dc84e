"""A registered client that is bad: `python -m tests.e2e.bad_client MODE DIR`.

It is the real program, with its answers changed just before they leave.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

from flwr.app import ConfigRecord, Message
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key

from fedvpa.network import supernode
from fedvpa.network.wire import RECORD, unpack

MODES = ("deep", "shape", "huge", "text", "masked")


def spoilt(mode: str, blob: bytes) -> bytes:
    """What is sent in place of an answer."""
    if mode == "deep":
        table = b"[" * 100_000 + b"]" * 100_000
        return struct.pack("<Q", len(table)) + table
    if mode == "shape":
        entry = {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}
        table = json.dumps({"__metadata__": {"fedvpa": '{"ok": true}'}, "x": entry}).encode()
        return struct.pack("<Q", len(table)) + table
    if mode == "huge":
        return blob + bytes(200 << 20)
    return b'{"ok": false, "error": "\n12:00:00 finished: {}\x1b[2J"}' * 50


class Bad(supernode.Answers):
    """Answers, but for those to training."""

    mode = "deep"

    def __call__(self, message: Message) -> Message:
        """The reply, changed."""
        reply = super().__call__(message)
        if reply.has_error():
            return reply
        records = reply.content.config_records
        if self.mode == "masked" and RECORD_KEY_CONFIGS in records:
            stage = records[RECORD_KEY_CONFIGS]
            if Key.MASKED_PARAMETERS in stage:
                stage[Key.MASKED_PARAMETERS] = list(stage[Key.MASKED_PARAMETERS])[:-1]  # type: ignore[arg-type]
        elif RECORD in records and message.metadata.message_type == "query":
            asked = unpack(message.content.config_records[RECORD]["blob"])  # type: ignore[arg-type]
            if asked.header["kind"] == "train":
                blob = records[RECORD]["blob"]
                assert isinstance(blob, bytes)
                records[RECORD] = ConfigRecord({"blob": spoilt(self.mode, blob)})
        return reply


if __name__ == "__main__":
    Bad.mode = sys.argv[1]
    supernode.Answers = Bad  # type: ignore[misc]
    supernode.run_client(Path(sys.argv[2]) / "client.yaml")
