"""``fedvpa server`` and ``fedvpa client``: the roles of a federation on Flower."""

from __future__ import annotations

import argparse
import signal

from fedvpa.console import Reporter, emit_json
from fedvpa.network.superlink import run_server
from fedvpa.network.supernode import run_client


def run_server_command(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Let the clients in, and follow the run to its end."""
    _stop_on_terminate()
    result = run_server(arguments.directory / "server.yaml")
    reporter.say(
        f"{result['run']}: done; next: fedvpa evaluate {result['run']} --data ... --split ..."
    )
    emit_json(arguments.json, result)
    return 0


def run_client_command(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Serve until interrupted."""
    _stop_on_terminate()
    run_client(arguments.directory / "client.yaml", arguments.min_cohort, arguments.patience)
    return 0


def _stop_on_terminate() -> None:
    """A polite kill ends what was started, as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
