"""`fedvpa server`: Flower's Fleet API for the registered clients, and one run, from its last
checkpoint to its end."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import torch

from fedvpa.config import Config
from fedvpa.errors import BadInputError
from fedvpa.federated.exchanges import EXCHANGES
from fedvpa.files import make_folder, private_file
from fedvpa.foreign import OneLine
from fedvpa.network.grid import FlowerTransport
from fedvpa.network.link import Link
from fedvpa.network.ports import port_is_free
from fedvpa.network.serve import LOG, expected_features, serve
from fedvpa.network.settings import ServerSettings, read_settings, training_config
from fedvpa.network.transport import Expected
from fedvpa.selector.selector import build_selector

logger = logging.getLogger("fedvpa")

NEEDED = ("certificates/server.crt", "certificates/server.key")
MOST_LOG = 32 << 20
"""Bytes of a log, of which the last two are kept besides."""
MOST_STARTS, MOST_COMPONENTS = 160, 10
"""Starts and components of a fit at the most, which the largest reply to it follows from."""


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
        link = Link(keys, largest_reply(config, features))
        certificate, key = (folder / name for name in NEEDED)
        # 3. From here on clients are let in.
        with link.listening(settings.host, settings.port, certificate, key):
            transport = FlowerTransport(link, settings)
            return serve(settings_path, transport, link.nodes, features)


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


def largest_reply(config: Config, features: Expected) -> int:
    """Bytes that the largest reply of a client takes, eight for each of its numbers (as masked ones
    do), and some for names."""
    sizes = {
        "d": config.model.latent, "m": MOST_COMPONENTS, "t": MOST_STARTS, "h": features.width
    }  # fmt: skip
    kinds = [kind for kind in EXCHANGES if kind != "train"]
    numbers = [
        sum(math.prod(sizes.get(s) or int(s) for s in f.shape.split()) for f in EXCHANGES[k].reply)
        for k in kinds
    ]
    params = build_selector(config).init(torch.Generator().manual_seed(0))
    modes = MOST_COMPONENTS if config.prototypes.modes == "auto" else config.prototypes.modes
    trained = sum(value.numel() for value in params.values())
    trained += (modes + 4) * (3 * config.model.latent + 2)
    return 8 * max(*numbers, trained) + (1 << 18)


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
