"""The process: opens the model, listens, and ends what runs when it is told to stop."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from fedvpa.errors import BadInputError
from fedvpa.serving.app import build_app
from fedvpa.serving.model import open_served
from fedvpa.serving.observing import log_json
from fedvpa.serving.settings import ServingSettings
from fedvpa.serving.store import Store

TOLD = "FEDVPA_SERVING"
"""Environment variable by which further processes are told the settings."""
GRACE = 20
"""Seconds that answers under way have when the server is told to stop."""


def check(settings: ServingSettings) -> None:
    """What can be known before a model is loaded.

    Raises:
        BadInputError: others could reach a server without keys; the database or the secret cannot
            be used.
    """
    settings.signing_secret()
    if settings.local:
        return
    store = Store(settings.url)
    try:
        keys = store.keys()
    finally:
        store.close()
    if not keys:
        raise BadInputError(
            f"--host {settings.host}: other machines could ask, and there are no keys; make one"
            f" with `fedvpa keys add --scope admin --store {settings.shown_url}`"
        )


def bound(settings: ServingSettings) -> socket.socket:
    """A socket at the server's address.

    Raises:
        BadInputError: the address is another's, or none of this machine's.
    """
    found = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((settings.host, settings.port))
    except OSError as error:
        found.close()
        raise BadInputError(
            f"--port {settings.port}: {error.strerror} at {settings.host}; give another --port"
        ) from error
    return found


def serve(settings: ServingSettings, say: Callable[[str], None], workers: int = 1) -> None:
    """Serve until told to stop.

    Args:
        settings: what to serve, and where.
        say: is told the address.
        workers: processes, each with the model.

    Raises:
        BadInputError: what `check`, `bound` and `open_served` refuse.
    """
    check(settings)
    given: dict[str, Any] = {
        "log_config": None, "access_log": False, "timeout_graceful_shutdown": GRACE,
        "server_header": False,
    }  # fmt: skip
    with bound(settings) as listening:
        host, port = listening.getsockname()[:2]
        say(f"http://{f'[{host}]' if ':' in host else host}:{port}, users in {settings.shown_url}")
        log_json()
        if workers == 1:
            app = build_app(open_served(settings), settings)
            uvicorn.Server(uvicorn.Config(app, **given)).run([listening])
            return
    os.environ[TOLD] = settings.model_dump_json()
    uvicorn.run(
        "fedvpa.serving.serve:from_environment", factory=True, workers=workers, host=host,
        port=port, **given,
    )  # fmt: skip


def from_environment() -> Any:
    """The application of one of several processes."""
    log_json()
    settings = ServingSettings.model_validate_json(os.environ[TOLD])
    return build_app(open_served(settings), settings)
