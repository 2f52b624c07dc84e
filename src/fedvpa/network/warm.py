"""Starts Flower's ClientApp processes by forking one that has loaded Flower already.

Flower starts a process for every message, of which importing Flower alone costs two seconds of a
core. A SuperNode finds the program `flwr-clientapp` by the search path; `install` puts a small one
first that asks this process for a fork. Each message still has a process of its own, with Flower's
own code in it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

_LAUNCHER = """#!{python} -IS
import json, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect({address!r})
s.sendall(json.dumps(sys.argv).encode() + b"\\n")
sys.exit(int(s.makefile().readline() or 1))
"""


def install(folder: Path) -> Path:
    """Write the launcher to `folder`, which goes first on the SuperNode's search path; the
    address it asks."""
    address = folder / "warm"
    program = folder / "flwr-clientapp"
    program.write_text(_LAUNCHER.format(python=sys.executable, address=str(address)))
    program.chmod(0o700)
    return address


def serve(address: str) -> None:
    """Load Flower, then fork for every launcher that asks."""
    import flwr.client.mod
    import flwr.compat.common.recorddict_compat  # noqa: F401
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    import fedvpa.network.masks
    import fedvpa.network.relay  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the system
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        os.chmod(address, 0o600)
        listener.listen(64)
        while True:
            connection, _ = listener.accept()
            if os.fork():
                connection.close()
                continue
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _become(connection, flwr_clientapp)


def _become(connection: socket.socket, program: object) -> None:
    """In the child: run Flower's program with the launcher's arguments, and tell the launcher
    how it ended."""
    code = 1
    try:
        sys.argv = json.loads(connection.makefile().readline())
        sys.argv[0] = "flwr-clientapp"
        program()  # type: ignore[operator]
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        connection.sendall(f"{code}\n".encode())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
