"""`fedvpa client`: a client and its node, until it is told to stop."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedvpa.errors import BadInputError, RunError
from fedvpa.files import make_folder
from fedvpa.foreign import harmless
from fedvpa.network.codes import RefusedError
from fedvpa.network.daemon import Client
from fedvpa.network.masked import SecureSums
from fedvpa.network.node import Node, NotTakenError, read_key
from fedvpa.network.settings import ClientSettings, read_settings
from fedvpa.network.superlink import logged
from fedvpa.network.wire import RECORD

logger = logging.getLogger("fedvpa")

LOG = "client.log"
RETRY_SECONDS = 1.0
STEADY_SECONDS = 20.0
"""A node that was connected for so long had a server."""
REFUSED = 0
"""Flower's number for an error that it knows nothing of."""


def run_client(settings_path: Path, min_cohort: int = 3, patience: float = math.inf) -> None:
    """Serve until interrupted. `min_cohort`: secure sums over fewer clients are refused;
    `patience`: seconds without a server after which it gives up.

    Raises:
        BadInputError: unusable settings, missing keys or certificates.
        RunError: there was no server for longer than `patience`.
    """
    settings = read_settings(settings_path, ClientSettings)
    folder = settings_path.parent
    for name in ("root_certificate", "key"):
        value = getattr(settings, name)
        if value is None:
            raise BadInputError(f"{settings_path}: {name} is not given")
        if not (folder / value).is_file():
            raise BadInputError(f"{settings_path}: {name}: {folder / value}: no such file")
    if not (folder / settings.data).exists():
        raise BadInputError(
            f"{settings_path}: data: {folder / settings.data}: no such file or folder"
        )
    key = read_key(folder / str(settings.key))
    authority = (folder / str(settings.root_certificate)).read_bytes()
    client = Client(settings, folder)
    make_folder(client.state_folder, private=True)
    answers = Answers(
        client, SecureSums(client.numbers, client.state_folder / "sums.txt", min_cohort)
    )
    with logged(folder / LOG, folder / LOG):
        _keep_node(settings, Node(settings.server, authority, key, answers), patience, folder / LOG)


class Answers:
    """Makes the reply to every message: by its type, in the clear or masked. Whatever else a
    message asks for is not looked at."""

    def __init__(self, client: Client, sums: SecureSums) -> None:
        self._client, self._sums = client, sums

    def __call__(self, message: Message) -> Message:
        """The reply; an error holds a code and nothing else."""
        try:
            if message.metadata.message_type == "train":
                return self._sums.reply(message)
            if message.metadata.message_type == "query":
                blob = message.content.config_records[RECORD]["blob"]
                if isinstance(blob, bytes):
                    answer = ConfigRecord({"blob": self._client.answer(blob)})
                    return Message(RecordDict({RECORD: answer}), reply_to=message)
            code = "unknown-request"
        except RefusedError as error:
            logger.error("%s: [%s] %s", self._client.settings.name, error.code, error)
            code = error.code
        # the message is the server's, and Flower's protocol reads it: whatever that raises
        except Exception as error:
            logger.error(
                "%s: a message was not answered: %s: %s",
                self._client.settings.name, type(error).__name__, harmless(error),
            )  # fmt: skip
            code = "unread"
        return Message(Error(REFUSED, code), reply_to=message)


def _keep_node(settings: ClientSettings, node: Node, patience: float, log: Path) -> None:
    """Serve a server; look for it again when it is away, or does not know this client's key."""
    name, server = settings.name, settings.server
    logger.info("client '%s' serves %s; log: %s", name, server, log)
    since, said = time.monotonic(), ""

    def connected() -> None:
        nonlocal since, said
        since, said = time.monotonic(), ""
        logger.info("client '%s' is connected", name)

    node.on_connected = connected
    while True:
        began = time.monotonic()
        try:
            node.serve()
        except NotTakenError as error:
            why = str(error)
        if time.monotonic() - began > STEADY_SECONDS:
            since = time.monotonic()
        if time.monotonic() - since > patience:
            raise RunError(
                f"{server} has not taken '{name}' for {patience:.0f} s: {why}; see {log}"
            )
        if why != said:
            logger.warning("client '%s' is not connected: %s; trying again", name, why)
            said = why
        time.sleep(RETRY_SECONDS)
