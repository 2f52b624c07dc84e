"""Seconds a federated round of the same workload takes: our engines, and Flower's simulation and
pfl where installed.

    python -m benchmarks.simulation [--clients 100] [--json FILE] [--quick] [--engines a,b]
    [--models a,b] [--workload natural]

The workload: every client is in the cohort and takes 30 local Adam steps of batch 8 on its 40
pairs; then FedAvg.

* `default`: the default selector (whitened inputs, small heads);
* `paper-size`: encoder 576-512-256-128 to 2 x 32, reward MLP 608-256-1, Bradley-Terry loss and
  Gaussian KL.

All engines take the same local steps on the same pairs (`fedvpa.federated.local.train_locally`);
they differ in how clients are scheduled, stacked and averaged. Each runs in a process of its own,
one after the other; a figure is the median over the rounds after the first. The peak is the
resident memory of the process and its children, sampled every 50 ms.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

MODELS = ("default", "paper-size")
ENGINES = ("fedvpa", "fedvpa-sequential", "flower-best", "flower-default", "pfl")
NEEDS = {"flower-best": "ray", "flower-default": "ray", "pfl": "pfl"}


def main(argv: list[str] | None = None) -> int:
    """Run the engines that can be run and print a table."""
    parser = argparse.ArgumentParser(description="Seconds a round: fedvpa, Flower, pfl.")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are timed (default: 5)")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument(
        "--quick", action="store_true", help="10 clients, the default model: within a minute"
    )
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument(
        "--workload", choices=("equal", "natural"), default="equal",
        help="natural: clients of very different sizes, beside equal ones with as many pairs",
    )  # fmt: skip
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "ENGINE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        seconds = run_engine(*arguments.one, arguments.clients, arguments.rounds)
        print(json.dumps(seconds))
        return 0
    if arguments.workload == "natural":
        return run_natural(arguments.clients, arguments.rounds, arguments.json)
    if arguments.quick:
        arguments.clients, arguments.rounds, arguments.models = 10, 1, "default"
        arguments.engines = ",".join(
            e for e in arguments.engines.split(",") if e != "flower-default"
        )
    rows = []
    for model in arguments.models.split(","):
        for engine in arguments.engines.split(","):
            if importlib.util.find_spec(NEEDS.get(engine, "fedvpa")) is None:
                print(
                    f"{model:12s} {engine:18s} not installed (pip install -e .[bench])",
                    file=sys.stderr,
                )
                continue
            seconds, peak = measure(model, engine, arguments.clients, arguments.rounds)
            if seconds is not None:
                rows.append({"model": model, "engine": engine, "clients": arguments.clients,
                             "seconds_per_round": seconds, "peak_gib": peak})  # fmt: skip
    best = {r["model"]: r["seconds_per_round"] for r in rows if r["engine"] == "flower-best"}
    for row in rows:
        reference = best.get(row["model"])
        row["ratio_to_flower_best"] = (
            None if reference is None else row["seconds_per_round"] / reference
        )
    print(
        f"{'model':12s} {'engine':18s} {'clients':>7s} {'s/round':>9s} {'peak GiB':>8s}"
        f" {'of flower-best':>14s}"
    )
    for r in rows:
        ratio = (
            "-" if r["ratio_to_flower_best"] is None else f"1/{1 / r['ratio_to_flower_best']:.1f}"
        )
        figures = f"{r['seconds_per_round']:9.4f} {r['peak_gib']:8.2f} {ratio:>14s}"
        print(f"{r['model']:12s} {r['engine']:18s} {r['clients']:7d} {figures}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def run_natural(clients: int, rounds: int, file: str | None) -> int:
    """Clients of very different sizes beside equal ones, in turns; every step reads all pairs."""
    from benchmarks.workload import build_sized, natural_sizes

    natural = natural_sizes(clients)
    mean, more = divmod(sum(natural), clients)
    sizes = {"natural": natural, "equal": [mean + (c < more) for c in range(clients)]}
    built = {name: build_sized(own) for name, own in sizes.items()}
    states = {name: algorithm.init(each.roster) for name, (algorithm, each) in built.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sizes}
    for _ in range(rounds + 1):
        for name, (algorithm, each) in built.items():
            start = time.perf_counter()
            states[name], _ = algorithm.apply(states[name], each, range(clients))
            seconds[name].append(time.perf_counter() - start)
    found = {name: median(own[1:]) for name, own in seconds.items()}
    rows = [
        {"workload": name, "clients": clients, "pairs": sum(own), "largest": max(own),
         "seconds_per_round": found[name], "ratio_to_equal": found[name] / found["equal"]}
        for name, own in sizes.items()
    ]  # fmt: skip
    heads = f"{'clients':>7s} {'pairs':>7s} {'largest':>7s} {'s/round':>9s} {'ratio':>6s}"
    print(f"{'workload':10s} {heads}")
    for r in rows:
        print(
            f"{r['workload']:10s} {r['clients']:7d} {r['pairs']:7d} {r['largest']:7d}"
            f" {r['seconds_per_round']:9.4f} {r['ratio_to_equal']:6.2f}"
        )
    if file:
        Path(file).write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def measure(model: str, engine: str, clients: int, rounds: int) -> tuple[float | None, float]:
    """Run one engine in a fresh process: median seconds per round, and peak memory in GiB."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.simulation",
        "--one",
        model,
        engine,
        "--clients",
        str(clients),
    ]
    process = subprocess.Popen(
        [*command, "--rounds", str(rounds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak, stop = [0.0], threading.Event()

    def watch() -> None:
        import psutil

        root = psutil.Process(process.pid)
        while not stop.wait(0.05):
            total = 0
            try:
                for p in [root, *root.children(recursive=True)]:
                    try:
                        total += p.memory_info().rss
                    except psutil.Error:
                        continue
            except psutil.Error:
                break
            peak[0] = max(peak[0], total / 2**30)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    out, err = process.communicate()
    stop.set()
    if process.returncode:
        print(f"{model} {engine}: failed\n{err[-2000:]}", file=sys.stderr)
        return None, peak[0]
    seconds = json.loads(out.strip().splitlines()[-1])
    return median(seconds), peak[0]


def run_engine(model: str, engine: str, clients: int, rounds: int) -> list[float]:
    """Seconds of each round after the first."""
    if engine.startswith("fedvpa"):
        return run_fedvpa(model, engine, clients, rounds)
    if engine.startswith("flower"):
        from benchmarks.engines.flower import run_flower

        return run_flower(model, engine == "flower-best", clients, rounds)
    from benchmarks.engines.pfl_engine import run_pfl

    return run_pfl(model, clients, rounds)


def run_fedvpa(model: str, engine: str, clients: int, rounds: int) -> list[float]:
    """Our simulator, vectorised or sequential."""
    from benchmarks.workload import build

    backend = "sequential" if engine == "fedvpa-sequential" else "vectorised"
    algorithm, simulated = build(model, clients, backend)
    state, seconds = algorithm.init(simulated.roster), []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        state, _ = algorithm.apply(state, simulated, range(clients))
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


if __name__ == "__main__":
    sys.exit(main())
