"""`fedvpa client`: a client and its Flower SuperNode, until it is told to stop."""

from __future__ import annotations

import logging
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Listener
from pathlib import Path
from threading import Thread

from fedvpa.errors import BadInputError, RunError
from fedvpa.network.daemon import Client
from fedvpa.network.processes import port_is_free, program, settings_line, start, stop
from fedvpa.network.settings import ClientSettings, read_settings
from fedvpa.network.warm import install

logger = logging.getLogger("fedvpa")

LOG = "client.log"
RETRY_SECONDS = 1.0
STEADY_SECONDS = 20.0
"""A node that ran for so long had a server."""


def run_client(
    settings_path: Path, min_cohort: int = 3, patience: float = math.inf, cold: bool = False
) -> None:
    """Serve until interrupted. `min_cohort`: secure sums over fewer clients are refused;
    `patience`: seconds without a server after which it gives up; `cold`: Flower starts its
    processes by itself, for each message.

    Raises:
        BadInputError: unusable settings, missing keys or certificates.
        RunError: there was no server for longer than `patience`.
    """
    settings = read_settings(settings_path, ClientSettings)
    folder = settings_path.parent
    for name in ("root_certificate", "key", "certificate", "certificate_key"):
        value = getattr(settings, name)
        if value is None:
            raise BadInputError(f"{settings_path}: {name} is not given")
        if not (folder / value).is_file():
            raise BadInputError(f"{settings_path}: {name}: {folder / value}: no such file")
    if not (folder / settings.data).exists():
        raise BadInputError(
            f"{settings_path}: data: {folder / settings.data}: no such file or folder"
        )
    if not port_is_free("127.0.0.1", settings.runtime_port):
        raise BadInputError(
            f"{settings_path}: runtime_port: {settings.runtime_port} is in use; choose another for"
            " each client"
        )
    client = Client(settings, folder)
    client.state_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # readable for this user alone; socket paths are short
    relay = Path(tempfile.mkdtemp(prefix="fedvpa-"))
    try:
        with Listener(str(relay / "relay"), family="AF_UNIX") as listener:
            Thread(target=_answer_all, args=(client, listener), daemon=True).start()
            with _forks(relay, folder) if not cold else nullcontext():
                _keep_node(settings, folder, relay, min_cohort, patience)
    finally:
        shutil.rmtree(relay, ignore_errors=True)


@contextmanager
def _forks(relay: Path, folder: Path) -> Iterator[None]:
    """While this lasts, Flower's ClientApps are forks of a process that has loaded Flower."""
    warm = start(
        [sys.executable, "-m", "fedvpa.network.warm", str(install(relay))],
        folder / LOG,
        folder / ".flwr",
    )
    try:
        yield
    finally:
        stop(warm)


def _answer_all(client: Client, listener: Listener) -> None:
    """Answer one connection after the other; what breaks a connection does not break the client."""
    while True:
        try:
            with listener.accept() as connection:
                connection.send_bytes(client.answer(connection.recv_bytes()))
        except (OSError, EOFError) as error:
            logger.debug("relay: %s", error)
            time.sleep(0.05)


def command(settings: ClientSettings, folder: Path, relay: Path, min_cohort: int) -> list[str]:
    """The SuperNode's command line."""
    return [
        program("flower-supernode"), "--superlink", settings.server,
        "--root-certificates", str(folder / str(settings.root_certificate)),
        "--auth-supernode-private-key", str(folder / str(settings.key)),
        "--host", "127.0.0.1", "--port", str(settings.runtime_port),
        "--ssl-certfile", str(folder / str(settings.certificate)),
        "--ssl-keyfile", str(folder / str(settings.certificate_key)),
        "--ssl-ca-certfile", str(folder / str(settings.root_certificate)),
        "--node-config", settings_line({"relay": str(relay), "min-cohort": min_cohort}),
    ]  # fmt: skip


def _keep_node(
    settings: ClientSettings, folder: Path, relay: Path, min_cohort: int, patience: float
) -> None:
    """Run the node; start it again when it ends, as it does while the server is away or does not
    know its key."""
    log = folder / LOG
    logger.info("client '%s' serves %s; log: %s", settings.name, settings.server, log)
    since = time.monotonic()
    said = ""
    while True:
        began, size = time.monotonic(), log.stat().st_size if log.is_file() else 0
        node = start(
            command(settings, folder, relay / "relay", min_cohort),
            log,
            folder / ".flwr",
            first=relay,
        )
        try:
            while node.poll() is None:  # while a server cannot be reached, a node tries for ever
                if time.monotonic() - since > patience and not _connected(log, size):
                    break
                time.sleep(0.5)
            code = node.poll()
        finally:
            stop(node)
        if time.monotonic() - began > STEADY_SECONDS:
            since = time.monotonic()
        why = _reason(log, size) or ("no answer" if code is None else f"it ended with code {code}")
        if time.monotonic() - since > patience:
            raise RunError(
                f"{settings.server} has not taken '{settings.name}' for {patience:.0f} s: {why};"
                f" see {log}"
            )
        if why != said:
            logger.warning("client '%s' is not connected: %s; trying again", settings.name, why)
            said = why
        time.sleep(RETRY_SECONDS)


def _connected(log: Path, begin: int) -> bool:
    """Whether the node says that a server has taken it."""
    with log.open("rb") as file:
        file.seek(begin)
        return b"SuperNode ID" in file.read()


def _reason(log: Path, begin: int) -> str:
    """Why the node says it ended."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    telling = ("[code:", "Failed", "The SuperNode", "Error", "ERROR:")
    reasons = [line for line in lines if line.startswith(telling) or "refused" in line]
    return " ".join(dict.fromkeys(reasons))[:300]
