"""A federation of real processes on loopback, for tests: `fedvpa server` and `fedvpa client`,
over TLS with node keys."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from fedvpa.data.preferences import to_record
from fedvpa.network.project import init_project
from fedvpa.network.superlink import port_is_free
from fedvpa.records import PreferencePair


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody uses."""
    # below the ports that are handed out
    for port in range(random.SystemRandom().randrange(20000, 30000), 32000, count):
        if not all(port_is_free("127.0.0.1", port + i) for i in range(count)):
            continue
        probes = []
        try:
            for i in range(count):
                probe = socket.socket()
                probes.append(probe)
                probe.bind(("127.0.0.1", port + i))
            return port
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
    raise AssertionError("no ports are free")


class Federation:
    """Starts, kills and restarts the processes; stops them all at the end."""

    def __init__(
        self,
        folder: Path,
        pairs: dict[str, list[PreferencePair]],
        training: dict[str, Any],
        **server: Any,
    ) -> None:
        self.folder, self.run = folder, folder / "run"
        secure = bool(server.pop("secure", False))
        port = free_ports(1)
        self.homes = init_project(folder, list(pairs), port=port, training=training, secure=secure)
        for home, own in zip(self.homes, pairs.values()):
            (home / "pairs.jsonl").write_text("".join(json.dumps(to_record(p)) + "\n" for p in own))
        self.change(**server)
        self.clients: dict[str, subprocess.Popen[bytes]] = {}
        self.server: subprocess.Popen[bytes] | None = None
        self.launched: list[subprocess.Popen[bytes]] = []

    def change(self, **server: Any) -> None:
        """Change settings of the server."""
        path = self.folder / "server.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | server))

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        processes = self.launched
        for process in processes:
            process.terminate()
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
            self.kill(process)

    def start_server(self) -> None:
        """Start (or restart) the server."""
        self.server = self.launch(["server", str(self.folder)], self.folder / "server.out")

    def start_client(self, name: str) -> None:
        """Start (or restart) a client."""
        home = self.folder / "clients" / name
        self.clients[name] = self.launch(["client", str(home)], home / "client.out")

    def start(self) -> None:
        """Start everybody."""
        self.start_server()
        for home in self.homes:
            self.start_client(home.name)

    def wait(self, seconds: float = 240) -> int:
        """Exit code of the server."""
        assert self.server is not None
        return self.server.wait(seconds)

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until the run has said something."""
        end = time.monotonic() + seconds
        while text not in self.said():
            assert time.monotonic() < end, f"'{text}' was not said:\n{self.said()}\n{self.out()}"
            assert self.server is None or self.server.poll() is None, self.out()
            time.sleep(0.1)

    def said(self) -> str:
        """The run's own log."""
        log = self.run / "log.txt"
        return log.read_text() if log.is_file() else ""

    def out(self) -> str:
        """What the server's process printed."""
        return (self.folder / "server.out").read_text()

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """kill -9, the whole group: as when a machine loses power."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def launch(self, arguments: list[str], out: Path) -> subprocess.Popen[bytes]:
        """Start `fedvpa`."""
        return self.launch_module("fedvpa.cli.main", arguments, out)

    def launch_module(
        self, module: str, arguments: list[str], out: Path, call: str = "", **variables: str
    ) -> subprocess.Popen[bytes]:
        """Start a module, or a function of it, in a process group of its own."""
        run = ["-c", f"from {module} import {call}; {call}()"] if call else ["-m", module]
        command = [sys.executable, *run, *arguments]
        places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": places} | variables
        with out.open("ab") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        self.launched.append(process)
        return process
