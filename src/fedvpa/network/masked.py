"""A client's side of secure sums: SecAgg+ (Bell et al., 2020) as Flower's client mod has it, with
the limits that protect a client from the server that runs the protocol."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import fitres_to_recorddict

from fedvpa.files import private_file
from fedvpa.network.codes import RefusedError
from fedvpa.network.masks import masks_for, replace_generator
from fedvpa.network.secure import LEVELS, MODULUS
from fedvpa.network.wire import RECORD


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
        self._answer, self._least = answer, least
        self._opened = Opened(opened)
        self._subject, self._request = "", b""
        self._sharers, self._threshold = set[int](), 0
        self._context: Context | None = None
        # its package hides it by a function
        self._mod = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
        replace_generator(self._mod)

    def reply(self, message: Message) -> Message:
        """The answer to one stage of the protocol.

        Raises:
            RefusedError: the server asks for more than an honest one does.
        """
        stage, about = message.content.config_records[RECORD_KEY_CONFIGS], message.metadata
        name = stage.get(Key.STAGE)
        if name == Stage.SETUP:
            self._check_setup(stage)
            self._subject, self._request, self._sharers = "", b"", set()
            self._context = Context(about.run_id, about.dst_node_id, {}, RecordDict(), {})
        if self._context is None:
            raise RefusedError("not-greeted", "a sum that this client has not begun")
        if name == Stage.COLLECT_MASKED_VECTORS:
            self._check_sources(stage, about.dst_node_id)
            blob = message.content.config_records[RECORD]["blob"]
            self._request = blob if isinstance(blob, bytes) else b""
        if name == Stage.UNMASK:
            self._check_opening(stage)
        with masks_for(self._request):
            reply: Message = self._mod.secaggplus_mod(message, self._context, self._numbers)
        return reply

    def _numbers(self, message: Message, context: Context) -> Message:
        """This client's numbers, which the mod masks before anybody sees them."""
        self._subject, numbers = self._answer(self._request)
        result = FitRes(
            Status(Code.OK, ""), ndarrays_to_parameters([np.frombuffer(numbers, "<f4")]), 1, {}
        )
        return Message(fitres_to_recorddict(result, keep_input=False), reply_to=message)

    def _check_setup(self, stage: Any) -> None:
        """Two thirds at least have to help to open a sum: then no two sums of the same numbers,
        which nobody helps with twice, differ by a single client."""
        count, threshold = int(stage[Key.SAMPLE_NUMBER]), int(stage[Key.THRESHOLD])
        enough = count >= self._least and 3 * threshold >= 2 * count and threshold <= count
        if not enough or int(stage[Key.SHARE_NUMBER]) != count:
            raise RefusedError(
                "cohort",
                f"a sum over {count} clients with threshold {threshold} (at least {self._least},"
                " two thirds)",
            )
        kinds = (Key.MOD_RANGE, Key.TARGET_RANGE, Key.CLIPPING_RANGE, Key.MAX_WEIGHT)
        if [stage[kind] for kind in kinds] != [MODULUS, LEVELS, 1.0, 1.0]:
            raise RefusedError("cohort", "masks or weights of another range, which would hide less")
        self._threshold = threshold

    def _check_sources(self, stage: Any, own: int) -> None:
        """Before this client's numbers are masked: enough others hold shares of its secrets, each
        counted once."""
        sources = list(stage[Key.SOURCE_LIST])
        self._sharers = {own, *sources}
        twice = len(self._sharers) != len(sources) + 1
        few = len(self._sharers) < max(self._least, self._threshold)
        if twice or few or len(stage[Key.CIPHERTEXT_LIST]) != len(sources):
            raise RefusedError("cohort", f"shares of {len(self._sharers)} clients, or some twice")

    def _check_opening(self, stage: Any) -> None:
        """Before this client gives away what opens a sum: enough are in it, no client is unmasked,
        and the same numbers have not been opened in another sum (the difference would show those
        who are in one of them)."""
        active, dead = list(stage[Key.ACTIVE_NODE_ID_LIST]), list(stage[Key.DEAD_NODE_ID_LIST])
        if len(set(active)) < max(self._least, self._threshold):
            raise RefusedError(
                "cohort",
                f"the sum would be opened over {len(set(active))} clients (at least"
                f" {max(self._least, self._threshold)})",
            )
        if set(active) & set(dead):
            raise RefusedError(
                "cohort", "the server asked for both secrets of a client, which would unmask it"
            )
        named = [*active, *dead]
        if len(set(named)) != len(named) or set(named) != self._sharers:
            raise RefusedError("cohort", "the sum would be opened over others than have begun it")
        among = hashlib.sha256(json.dumps(sorted(active)).encode()).hexdigest()
        if self._opened.get(self._subject, among) != among:
            raise RefusedError(
                "second-sum",
                "these numbers are in a sum over other clients already; the difference of two sums"
                " would show single clients",
            )
        self._opened.note(self._subject, among)


class Opened:
    """The sums that a client has helped to open, by subject, in a file that only grows."""

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text().split("\n") if file.is_file() else []
        self._known = dict(line.rsplit(" ", 1) for line in lines if " " in line)

    def get(self, subject: str, otherwise: str) -> str:
        """Over whom the numbers of a subject were opened."""
        return self._known.get(subject, otherwise)

    def note(self, subject: str, among: str) -> None:
        """Write it down, before anything is given away.

        Raises:
            OSError: the disk is full: then nothing is.
        """
        if subject in self._known:
            return
        with private_file(self._file).open("a") as file:
            file.write(f"{subject} {among}\n")
            file.flush()
            os.fsync(file.fileno())
        self._known[subject] = among
