"""The process: opens the model, listens, and ends what runs when it is told to stop."""

from __future__ import annotations

import logging
import os
import socket
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
        BadInputError: others could reach a server without keys; the port is taken; the database
            or the secret cannot be used.
    """
    settings.signing_secret()
    if settings.port:
        with socket.socket(_family(settings.host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((settings.host, settings.port))
            except OSError as error:
                raise BadInputError(
                    f"--port {settings.port}: {error.strerror} at {settings.host}; give another"
                    " --port"
                ) from error
    if not settings.local:
        store = Store(settings.url)
        try:
            keys = store.keys()
        finally:
            store.close()
        if not keys:
            raise BadInputError(
                f"--host {settings.host}: other machines could ask, and there are no keys; make one"
                f" with `fedvpa keys add --scope admin --store {settings.url}`"
            )


def serve(settings: ServingSettings, workers: int = 1) -> None:
    """Serve until told to stop.

    Raises:
        BadInputError: what `check` and `open_served` refuse.
    """
    check(settings)
    given: dict[str, Any] = {
        "host": settings.host, "port": settings.port, "log_config": None, "access_log": False,
        "timeout_graceful_shutdown": GRACE, "server_header": False,
    }  # fmt: skip
    log_json()
    if workers > 1:
        os.environ[TOLD] = settings.model_dump_json()
        uvicorn.run("fedvpa.serving.serve:from_environment", factory=True, workers=workers, **given)
        return
    app = build_app(open_served(settings), settings)
    logging.getLogger("fedvpa.serving").info(
        "listening", extra={"fields": {"host": settings.host, "port": settings.port}}
    )
    uvicorn.run(app, **given)


def from_environment() -> Any:
    """The application of one of several processes."""
    log_json()
    settings = ServingSettings.model_validate_json(os.environ[TOLD])
    return build_app(open_served(settings), settings)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
