"""`fedvpa server`: a Flower SuperLink, the registered clients, and one run, from its last
checkpoint to its end."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from fedvpa.errors import BadInputError, RunError
from fedvpa.files import write_atomically
from fedvpa.network.processes import (
    port_is_free,
    program,
    run,
    settings_line,
    start,
    stop,
    tail,
    wait_for_port,
)
from fedvpa.network.serve import BOUND, LOG
from fedvpa.network.settings import ServerSettings, read_settings, training_config

logger = logging.getLogger("fedvpa")

START_SECONDS = 120.0


def run_server(settings_path: Path) -> dict[str, Any]:
    """Start everything, follow the run, stop everything; what the run left in `federation.json`.

    Raises:
        BadInputError: unusable settings, missing certificates or keys, or a port in use.
        RunError: the run failed; it goes on from its last checkpoint when the server is started
            again.
    """
    settings_path = settings_path.resolve()
    settings = read_settings(settings_path, ServerSettings)
    training_config(settings)
    folder = settings_path.parent
    needed = [
        "certificates/ca.crt",
        "certificates/server.crt",
        "certificates/server.key",
        "app/pyproject.toml",
    ]
    for name in [*needed, *(f"keys/{client}.pub" for client in settings.clients)]:
        if not (folder / name).is_file():
            raise BadInputError(
                f"{folder / name}: no such file; `fedvpa federation init` makes a project with all"
                " of them"
            )
    local = "127.0.0.1" if settings.host == "0.0.0.0" else settings.host
    if not port_is_free(local, settings.port):
        raise BadInputError(
            f"port {settings.port} on {settings.host} is in use; choose another in {settings_path}"
        )
    home, log = folder / ".flwr", folder / "server.log"
    write_atomically(home / "config.toml", _connection(settings, folder, local).encode())
    status = folder / settings.run / "status.json"
    status.unlink(missing_ok=True)
    link = start(command(settings, folder), log, home)
    try:
        wait_for_port(local, settings.port, link, log)
        keys = {client: str(folder / "keys" / f"{client}.pub") for client in settings.clients}
        flags = ["--format", "json"]
        commands = [
            ["supernode", "register", key, "fedvpa", "--name", client, *flags]
            for client, key in keys.items()
        ]
        said_nodes = run(
            [sys.executable, "-m", "fedvpa.network.submit"], home, json.dumps(commands)
        )
        write_atomically(
            folder / BOUND, json.dumps(dict(zip(keys, _node_ids(said_nodes)))).encode()
        )
        said = folder / settings.run / LOG
        begin = said.stat().st_size if said.is_file() else 0
        attempt = uuid.uuid4().hex
        given = settings_line({"settings": str(settings_path), "attempt": attempt})
        begin_run = ["run", str(folder / "app"), "fedvpa", "--run-config", given]
        run([sys.executable, "-m", "fedvpa.network.submit"], home, json.dumps([begin_run]))
        return _follow(link, log, begin, folder / settings.run, attempt)
    finally:
        stop(link)


def _node_ids(said: str) -> list[int]:
    """Ids of the nodes that `flwr supernode register --format json` has registered, in their order.

    Raises:
        RunError: it says none.
    """
    found = [int(node) for node in re.findall(r'"node-id":\s*"?(\d+)', said)]
    if not found:
        raise RunError(f"registering the clients gave no node ids: {' '.join(said.split())[-300:]}")
    return found


def command(settings: ServerSettings, folder: Path) -> list[str]:
    """The SuperLink's command line."""
    certificates = folder / "certificates"
    return [
        program("flower-superlink"), "--host", settings.host, "--port", str(settings.port),
        "--enable-supernode-auth",
        "--ssl-certfile", str(certificates / "server.crt"), "--ssl-keyfile",
        str(certificates / "server.key"),
        "--ssl-ca-certfile", str(certificates / "ca.crt"),
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip


def _connection(settings: ServerSettings, folder: Path, host: str) -> str:
    address = json.dumps(f"{host}:{settings.port}")
    root = json.dumps(str(folder / "certificates" / "ca.crt"))
    return (
        '[superlink]\ndefault = "fedvpa"\n\n[superlink.fedvpa]\naddress ='
        f" {address}\nroot-certificates = {root}\n"
    )


def _follow(
    link: subprocess.Popen[bytes], log: Path, begin: int, root: Path, attempt: str
) -> dict[str, Any]:
    """Repeat what the run says, until this attempt at it is over."""
    started, status, said = time.monotonic(), root / "status.json", root / LOG
    while True:
        now = json.loads(status.read_text()) if status.is_file() else {}
        now = now if now.get("attempt") == attempt else {}
        if said.is_file():
            with said.open("rb") as file:
                file.seek(begin)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            begin += len(whole)
            for line in whole.decode(errors="replace").splitlines():
                logger.info("%s", line)
        if now.get("state") == "finished":
            found: dict[str, Any] = json.loads((root / "federation.json").read_text())
            return found
        if now.get("state") == "failed":
            raise RunError(
                f"{now.get('message')}; start the server again to go on from the last checkpoint"
            )
        if link.poll() is not None:
            raise RunError(
                f"the SuperLink ended with code {link.returncode}: {tail(log)}; start the server"
                " again to go on"
            )
        if not now and time.monotonic() - started > START_SECONDS:
            raise RunError(f"the ServerApp did not start within {START_SECONDS:.0f} s: {tail(log)}")
        if now and not _alive(now.get("pid")):
            raise RunError(
                f"the ServerApp's process is gone: {tail(log)}; start the server again to go on"
            )
        time.sleep(0.2)


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (OSError, TypeError, ValueError):
        return False
    return True
