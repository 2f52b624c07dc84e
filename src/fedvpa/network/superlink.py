"""`fedvpa server`: Flower's Fleet API for the registered clients, and one run, from its last
checkpoint to its end."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from fedvpa.config import Config
from fedvpa.errors import BadInputError
from fedvpa.files import make_folder, private_file
from fedvpa.foreign import OneLine
from fedvpa.network.grid import FlowerTransport
from fedvpa.network.link import Link
from fedvpa.network.serve import LOG, expected_features, serve, travels
from fedvpa.network.settings import ServerSettings, read_settings, training_config
from fedvpa.network.transport import Expected

logger = logging.getLogger("fedvpa")

NEEDED = ("certificates/server.crt", "certificates/server.key")
MOST_LOG = 32 << 20
"""Bytes of a log, of which the last two are kept besides."""


def run_server(settings_path: Path) -> dict[str, Any]:
    """Serve the clients and follow the run to its end; what the run left in `federation.json`.

    Raises:
        BadInputError: unusable settings, missing certificates or keys, or a port in use.
        RunError: the run failed; it goes on from its last checkpoint when the server is started
            again.
    """
    # 1. Everything that can be wrong with the project is found before anybody is let in.
    settings_path = settings_path.resolve()
    settings = read_settings(settings_path, ServerSettings)
    config = training_config(settings)
    folder = settings_path.parent
    keys = read_keys(settings, folder)
    for name in NEEDED:
        if not (folder / name).is_file():
            raise BadInputError(
                f"{folder / name}: no such file; `fedvpa federation init` makes a project with all"
                " of them"
            )
    local = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    if not port_is_free(local, settings.port):
        raise BadInputError(
            f"port {settings.port} on {settings.host} is in use; choose another in {settings_path}"
        )
    make_folder(folder / settings.run, private=True)
    with logged(folder / "server.log", folder / settings.run / LOG):
        # 2. What a reply can hold at the most bounds what is taken from anybody.
        features = expected_features(settings, config)
        link = Link(keys, largest_reply(config, settings, features))
        certificate, key = (folder / name for name in NEEDED)
        # 3. From here on clients are let in.
        with link.listening(settings.host, settings.port, certificate, key):
            transport = FlowerTransport(link, settings)
            return serve(settings_path, transport, link.nodes, features)


def port_is_free(host: str, port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) != 0


def read_keys(settings: ServerSettings, folder: Path) -> dict[str, bytes]:
    """The public key of every client.

    Raises:
        BadInputError: one is missing.
    """
    keys = {}
    for client in settings.clients:
        path = folder / "keys" / f"{client}.pub"
        if not path.is_file():
            raise BadInputError(
                f"{path}: no such file; put the public key of '{client}' there (`ssh-keygen -t"
                ' ecdsa -b 384 -N "" -f node.key` makes a pair)'
            )
        keys[client] = path.read_bytes()
    return keys


def largest_reply(config: Config, settings: ServerSettings, features: Expected) -> int:
    """Bytes that no reply of a client exceeds: twice all that a client ever sends (masked numbers
    take eight bytes instead of four), and some for names and keys."""
    rows = travels(config, settings.clients, features.width)
    return 2 * sum(row["bytes"] for row in rows if row["direction"] == "up") + (1 << 18)


class Rotated(RotatingFileHandler):
    """A log for this user alone, of a bounded size: what is written there may be others' doing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__(private_file(path), maxBytes=MOST_LOG, backupCount=2)

    def _open(self) -> TextIOWrapper:
        private_file(self._path)
        return super()._open()


@contextmanager
def logged(flower: Path, run: Path) -> Iterator[None]:
    """While this lasts, what Flower and the web server say goes to one file, and what the run says
    also to another."""
    with_handlers = []
    for path, names in ((flower, ("flwr", "uvicorn", "asyncio", "httpx")), (run, ("fedvpa",))):
        handler = Rotated(path)
        handler.setFormatter(OneLine("%(asctime)s %(message)s", "%H:%M:%S"))
        for name in names:
            found = logging.getLogger(name)
            before = (found.handlers[:], found.propagate, found.level)
            if name != "fedvpa":  # Flower writes to the terminal by itself, and much
                found.handlers, found.propagate = [], False
                found.setLevel(logging.WARNING)
            else:  # the file holds all of it, however quiet the terminal is
                found.setLevel(min(found.getEffectiveLevel(), logging.INFO))
            found.addHandler(handler)
            with_handlers.append((found, before, handler))
    try:
        yield
    finally:
        for found, (handlers, propagate, level), handler in with_handlers:
            found.handlers, found.propagate = handlers, propagate
            found.setLevel(level)
            handler.close()
