"""Seconds and bytes of a round of a real federation on this machine: processes, over TLS, with node
keys.

python -m benchmarks.federation [--clients 10] [--rounds 6]: median over the rounds after the first,
without and with secure sums.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedvpa.files import plain_json


def fedvpa(*arguments: str) -> list[str]:
    """The command line of this installation."""
    return [sys.executable, "-m", "fedvpa.cli.main", *arguments]


def run(folder: Path, clients: int, rounds: int, secure: bool) -> dict[str, Any]:
    """One federation from its first round to its last."""
    settings = ["--method", "fedvpl", "--rounds", str(rounds), "--data", "personas"]
    settings += ["--prior.kind", "components" if secure else "gaussian", "--modes", "2"]
    settings += ["--clients", str(clients), "--pairs", "10", "--validate-every", "999"]
    settings += ["--prior.start_round", "999", "--secure"] if secure else []
    init = fedvpa("federation", "init", str(folder), "--trial", "--quiet", *settings)
    subprocess.run(init, check=True)
    homes = sorted((folder / "clients").iterdir())
    nodes = [subprocess.Popen(fedvpa("client", str(home), "--quiet")) for home in homes]
    try:
        subprocess.run(fedvpa("server", str(folder), "--quiet"), check=True)
    finally:
        for node in nodes:
            node.terminate()
        for node in nodes:
            node.wait()
    log = (folder / "run" / "log.txt").read_text().splitlines()
    said = [line for line in log if " round " in line and " of " in line]
    seconds = [float(line.split(": ")[1].split(" s")[0]) for line in said]
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    every = [row for row in manifest if row["when"] == "every round"]
    total = json.loads((folder / "run" / "federation.json").read_text())
    return {
        "seconds": seconds[1:],
        "median": statistics.median(seconds[1:]),
        "bytes_a_round": {
            way: sum(r["bytes"] for r in every if r["direction"] == way) for way in ("down", "up")
        },
        "bytes_in_all": total["bytes"],
    }


def main() -> None:
    """The figures, and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", choices=["plain", "secure"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fedvpa-bench-") as root:
        for name in ("plain", "secure"):
            if arguments.only in (None, name):
                where = Path(root) / name
                results[name] = run(where, arguments.clients, arguments.rounds, name == "secure")
                print(name, json.dumps(results[name]), flush=True)
    if arguments.json:
        arguments.json.write_bytes(plain_json(results))


if __name__ == "__main__":
    main()
