"""Flower's programs as child processes: found beside this Python, logged to a file, ended with
their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvpa.errors import BadInputError, RunError

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}
"""No calls home, nothing installed at run time, tasks looked for ten times a second (Flower's
default: once)."""


def program(name: str) -> str:
    """Path of one of Flower's programs.

    Raises:
        BadInputError: Flower is not installed here.
    """
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise BadInputError(
            f"{name} is not installed beside {sys.executable}; pip install 'fedvpa[federation]'"
        )
    return str(path)


def environment(home: Path, first: Path | None = None) -> dict[str, str]:
    """Environment of Flower's programs, whose own files go to `home`."""
    places = [
        *([str(first)] if first else []),
        str(Path(sys.executable).parent),
        os.environ.get("PATH", ""),
    ]
    path = os.pathsep.join(places)
    return {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(home), "PATH": path}


def start(
    command: Sequence[str], log: Path, home: Path, first: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a program that ends when this process does, even if this one is killed (on Linux); it
    looks for others in `first` before anywhere else."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            list(command), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=environment(home, first),
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def run(command: Sequence[str], home: Path, given: str = "") -> str:
    """Run a program to its end, with something on its standard input; its standard output.

    Raises:
        RunError: it failed; the message holds the last of what it said.
    """
    done = subprocess.run(
        list(command), env=environment(home), capture_output=True, text=True, input=given
    )
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[-400:]
        raise RunError(f"{' '.join(command[1:3])}: {said}")
    return done.stdout


def stop(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """End a program: politely, then not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_port(
    host: str, port: int, process: subprocess.Popen[bytes], log: Path, patience: float = 60.0
) -> None:
    """Wait until a program listens.

    Raises:
        RunError: it ended, or does not listen in time.
    """
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RunError(f"{Path(str(process.args[0])).name} ended at once: {tail(log)}")  # type: ignore[index]
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex((host, port)) == 0:
                return
        time.sleep(0.2)
    raise RunError(f"nothing listens on {host}:{port} after {patience:.0f} s; see {log}")


def port_is_free(host: str, port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) != 0


def tail(log: Path, characters: int = 400) -> str:
    """The last words of a log, on one line."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    return " ".join(text.split())[-characters:]


def settings_line(values: Mapping[str, Any]) -> str:
    """Settings as Flower's command line wants them: ``key="value" key2=3``."""
    return " ".join(
        f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}"
        for key, value in values.items()
    )
