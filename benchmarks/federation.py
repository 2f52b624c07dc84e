"""Seconds and bytes of a round of a real federation on this machine: processes, over TLS, with node
keys.

python -m benchmarks.federation [--clients 10] [--rounds 6]: median over the rounds after the first;
with ClientApps that are forked (`warm`), that Flower starts for every message (`cold`), and with
secure sums; and how long such a start takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fedvpa.files import plain_json
from fedvpa.network.processes import environment, program


def fedvpa(*arguments: str) -> list[str]:
    """The command line of this installation."""
    return [sys.executable, "-m", "fedvpa.cli.main", *arguments]


def run(folder: Path, clients: int, rounds: int, cold: bool, secure: bool) -> dict[str, Any]:
    """One federation from its first round to its last."""
    settings = [
        "--method",
        "fedvpl",
        "--prior.kind",
        "components" if secure else "gaussian",
        "--rounds",
        str(rounds),
    ]
    settings += [
        "--data",
        "personas",
        "--clients",
        str(clients),
        "--pairs",
        "10",
        "--validate-every",
        "999",
        "--modes",
        "2",
    ]
    settings += ["--prior.start_round", "999"] if secure else []
    init = [
        *fedvpa("federation", "init", str(folder), "--trial", "--quiet"),
        *settings,
        *(["--secure"] if secure else []),
    ]
    subprocess.run(init, check=True)
    nodes = [
        subprocess.Popen([*fedvpa("client", str(home), "--quiet"), *(["--cold"] if cold else [])])
        for home in sorted((folder / "clients").iterdir())
    ]
    try:
        subprocess.run(fedvpa("server", str(folder), "--quiet"), check=True)
    finally:
        for node in nodes:
            node.terminate()
        for node in nodes:
            node.wait()
    log = (folder / "run" / "log.txt").read_text().splitlines()
    seconds = [
        float(line.split(": ")[1].split(" s")[0])
        for line in log
        if " round " in line and " of " in line
    ]
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    each = {
        way: sum(
            r["bytes"] for r in manifest if r["direction"] == way and r["when"] == "every round"
        )
        for way in ("down", "up")
    }
    total = json.loads((folder / "run" / "federation.json").read_text())
    return {
        "seconds": seconds[1:],
        "median": statistics.median(seconds[1:]),
        "bytes_a_round": each,
        "bytes_in_all": total["bytes"],
    }


def main() -> None:
    """The figures, and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", choices=["warm", "cold", "secure"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fedvpa-bench-") as root:
        began = time.perf_counter()
        subprocess.run(
            [program("flwr-clientapp"), "--help"],
            env=environment(Path(root)),
            capture_output=True,
            check=True,
        )
        results["start of flwr-clientapp"] = time.perf_counter() - began
        for name, cold, secure in (
            ("warm", False, False),
            ("cold", True, False),
            ("secure", False, True),
        ):
            if arguments.only in (None, name):
                results[name] = run(
                    Path(root) / name, arguments.clients, arguments.rounds, cold, secure
                )
                print(name, json.dumps(results[name]), flush=True)
    print(f"start of flwr-clientapp: {results['start of flwr-clientapp']:.2f} s")
    if arguments.json:
        arguments.json.write_bytes(plain_json(results))


if __name__ == "__main__":
    main()
