"""The ClientApp: it passes blobs between Flower and the client on this machine (`fedvpa client`),
and knows nothing else.

A process of it is started for every message, so it imports neither torch nor the rest of fedvpa.
"""

from __future__ import annotations

import importlib
import struct
from multiprocessing.connection import Client
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

RECORD = "fedvpa"
WAIT_SECONDS = 600.0

app = ClientApp()


def through(message: Message, context: Context) -> bytes:
    """The client's answer to the blob of this message.

    Raises:
        RuntimeError: no client runs here, or it did not answer.
    """
    address = str(context.node_config["relay"])
    blob = message.content.config_records[RECORD]["blob"]
    if not isinstance(blob, bytes):
        raise RuntimeError("the message holds no blob")  # noqa: TRY004
    try:
        with Client(address, family="AF_UNIX") as connection:
            connection.send_bytes(blob)
            if not connection.poll(WAIT_SECONDS):
                raise RuntimeError(f"the client did not answer within {WAIT_SECONDS:.0f} s")
            return connection.recv_bytes()
    except (OSError, EOFError) as error:
        raise RuntimeError(
            f"no fedvpa client runs on this node ({error}); start it with `fedvpa client`"
        ) from error


@app.query()
def plain(message: Message, context: Context) -> Message:
    """A request whose answer the server reads."""
    return Message(
        RecordDict({RECORD: ConfigRecord({"blob": through(message, context)})}), reply_to=message
    )


def _secure(message: Message, context: Context, call_next: Any) -> Message:
    """Flower's SecAgg+ with masks from a stream cipher; a server that asks for too much is
    refused."""
    from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage

    from fedvpa.network.masks import replace_generator

    # its package hides it by a function
    module = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
    replace_generator(module)
    least = int(context.node_config.get("min-cohort", 3))
    stage = message.content.config_records[RECORD_KEY_CONFIGS]
    if stage.get(Key.STAGE) == Stage.SETUP:
        count, threshold = int(stage[Key.SAMPLE_NUMBER]), int(stage[Key.THRESHOLD])
        if count < least or 2 * threshold <= count or int(stage[Key.SHARE_NUMBER]) != count:
            raise RuntimeError(
                f"refused: a sum over {count} clients with threshold {threshold} (at least {least},"
                " over half)"
            )
        if int(stage[Key.MOD_RANGE]) != 1 << 32 or int(stage[Key.TARGET_RANGE]) != 1 << 22:
            raise RuntimeError("refused: masks of another range, which would hide less")
    if stage.get(Key.STAGE) == Stage.UNMASK:
        active, dead = stage[Key.ACTIVE_NODE_ID_LIST], stage[Key.DEAD_NODE_ID_LIST]
        if len(set(active)) < least:
            raise RuntimeError(
                f"refused: the sum would be opened over {len(set(active))} clients (at least"
                f" {least})"
            )
        if set(active) & set(dead):
            raise RuntimeError(
                "refused: the server asked for both secrets of a client, which would unmask it"
            )
    return module.secaggplus_mod(message, context, call_next)


@app.train(mods=[_secure])
def masked(message: Message, context: Context) -> Message:
    """A request whose answer is a flat float32 vector, which the mod masks."""
    import numpy as np
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
    from flwr.compat.common.recorddict_compat import fitres_to_recorddict

    answer = through(message, context)
    (ok,) = struct.unpack("<?", answer[:1])
    if not ok:
        raise RuntimeError(answer[1:].decode(errors="replace"))
    vector = np.frombuffer(answer[1:], dtype="<f4")
    result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([vector]), 1, {})
    return Message(fitres_to_recorddict(result, keep_input=False), reply_to=message)
