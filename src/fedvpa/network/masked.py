"""A client's side of secure sums: SecAgg+ (Bell et al., 2020) as Flower's client mod has it, with
the limits that protect a client from the server that runs the protocol."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import fitres_to_recorddict

from fedvpa.files import write_atomically
from fedvpa.network.codes import RefusedError
from fedvpa.network.masks import replace_generator
from fedvpa.network.secure import LEVELS, MODULUS

RECORD = "fedvpa"
MOST_REMEMBERED = 1000
"""Sums of which a client remembers who was in them."""


class SecureSums:
    """The sums that one client takes part in, one after the other.

    Args:
        answer: the client's numbers for a request: a subject, which names the numbers, and float32
            bytes.
        opened: the file in which the client remembers the sums that it has helped to open.
        least: sums over fewer clients are refused.
    """

    def __init__(
        self, answer: Callable[[bytes], tuple[str, bytes]], opened: Path, least: int
    ) -> None:
        self._answer, self._file, self._least = answer, opened, least
        self._subject = ""
        self._context: Context | None = None
        # its package hides it by a function
        self._mod = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
        replace_generator(self._mod)

    def reply(self, message: Message) -> Message:
        """The answer to one stage of the protocol.

        Raises:
            RefusedError: the server asks for more than an honest one does.
        """
        stage = message.content.config_records[RECORD_KEY_CONFIGS]
        if stage.get(Key.STAGE) == Stage.SETUP:
            self._check_setup(stage)
            self._subject, self._context = "", None
        if stage.get(Key.STAGE) == Stage.UNMASK:
            self._check_opening(stage)
        if self._context is None:
            about = message.metadata
            self._context = Context(about.run_id, about.dst_node_id, {}, RecordDict(), {})
        reply: Message = self._mod.secaggplus_mod(message, self._context, self._numbers)
        return reply

    def _numbers(self, message: Message, context: Context) -> Message:
        """This client's numbers, which the mod masks before anybody sees them."""
        blob = message.content.config_records[RECORD]["blob"]
        if not isinstance(blob, bytes):
            raise RefusedError("unread", "the message holds no blob")
        self._subject, numbers = self._answer(blob)
        result = FitRes(
            Status(Code.OK, ""), ndarrays_to_parameters([np.frombuffer(numbers, "<f4")]), 1, {}
        )
        return Message(fitres_to_recorddict(result, keep_input=False), reply_to=message)

    def _check_setup(self, stage: Any) -> None:
        count, threshold = int(stage[Key.SAMPLE_NUMBER]), int(stage[Key.THRESHOLD])
        enough = count >= self._least and 2 * threshold > count
        if not enough or int(stage[Key.SHARE_NUMBER]) != count:
            raise RefusedError(
                "cohort",
                f"a sum over {count} clients with threshold {threshold} (at least {self._least},"
                " over half)",
            )
        ranges = (int(stage[Key.MOD_RANGE]), int(stage[Key.TARGET_RANGE]))
        if ranges != (MODULUS, LEVELS):
            raise RefusedError("cohort", "masks of another range, which would hide less")

    def _check_opening(self, stage: Any) -> None:
        """Before this client gives away what opens a sum: enough are in it, no client is unmasked,
        and the same numbers have not been opened in another sum (the difference would show those
        who are in one of them)."""
        active, dead = set(stage[Key.ACTIVE_NODE_ID_LIST]), set(stage[Key.DEAD_NODE_ID_LIST])
        if len(active) < self._least:
            raise RefusedError(
                "cohort",
                f"the sum would be opened over {len(active)} clients (at least {self._least})",
            )
        if active & dead:
            raise RefusedError(
                "cohort", "the server asked for both secrets of a client, which would unmask it"
            )
        known = self._opened()
        among = hashlib.sha256(json.dumps(sorted(active)).encode()).hexdigest()
        if known.get(self._subject, among) != among:
            raise RefusedError(
                "second-sum",
                "these numbers are in a sum over other clients already; the difference of two sums"
                " would show single clients",
            )
        if self._subject not in known:
            kept = dict([*known.items(), (self._subject, among)][-MOST_REMEMBERED:])
            write_atomically(self._file, json.dumps(kept).encode(), private=True)

    def _opened(self) -> dict[str, str]:
        if not self._file.is_file():
            return {}
        found: dict[str, str] = json.loads(self._file.read_text())
        return found
