"""Tune every method with the same trials, on validation pairs carved from the training data; test
data are not read.

python -m benchmarks.tuning --data-root DIR --out benchmarks/tuned.yaml --csv results/tuning.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml

from fedvpa.config import build_config, merged
from fedvpa.experiment.train import train
from fedvpa.methods import method as entry_of

METHODS = (
    "fedvpl+anchors", "fedvpl", "fedvpl+mix", "fedvpl+ortho", "centralised-vpl", "fedavg-btl",
    "fedavg-btl-mlp",
    "fedavg-btl+finetune", "fedbiscuit", "oracle-group", "oracle-bayes",
)  # fmt: skip
"""All but `local`, which runs at its defaults."""
SHARED: list[dict[str, Any]] = [
    {"federation": {"learning_rate": rate, "local_steps": steps}}
    for rate in (0.001, 0.003, 0.01)
    for steps in (10, 30)
]
"""Six trials of step size and local steps, the same for all methods."""
DECAY: list[dict[str, Any]] = [
    {"federation": {"learning_rate": 0.003, "local_steps": steps, "weight_decay": 0.01}}
    for steps in (30, 10)
]
REWARD_DECAY: list[dict[str, Any]] = [
    {
        "federation": {"learning_rate": 0.003, "local_steps": 30},
        "objective": {"reward_decay": decay},
    }
    for decay in (0.01, 0.03)
]
"""Two of regularisation: L2 on all weights, or, where a latent picks the reward, on the reward
that it picks."""
CLIENTS = (30, 90)
"""With 30 % of the pairs held out, clients are about as large as the benchmark's 40 and 120."""
SEEDS = (100, 101, 102)


def trials(method: str) -> list[dict[str, Any]]:
    """The eight trials of a method."""
    return [*SHARED, *(REWARD_DECAY if entry_of(method).latent else DECAY)]


def trial(job: tuple[str, dict[str, Any], int, int, str]) -> float:
    """Validation accuracy after the last round: z from a client's training pairs, targets its
    validation pairs."""
    method, settings, clients, seed, source = job
    with tempfile.TemporaryDirectory() as place:
        data = {"source": source, "split": "train", "clients": clients, "validation_share": 0.3}
        given = {"method": method, "seed": seed, "out": f"{place}/run", "data": data}
        result = train(
            build_config(merged(merged({"federation": {"validate_every": 50}}, settings), given))
        )
    return float(result.history[-1]["validation_accuracy"])


def main() -> None:
    """Run all trials and write the best settings of each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    source = str(arguments.data_root / "hh_rlhf/human")
    jobs = [
        (m, t, k, s, source) for m in METHODS for t in trials(m) for k in CLIENTS for s in SEEDS
    ]
    with ProcessPoolExecutor(
        arguments.jobs,
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        accuracy = list(pool.map(trial, jobs, chunksize=4))
    rows: dict[tuple[str, str], dict[int, list[float]]] = {}
    for (method, settings, clients, _, _), value in zip(jobs, accuracy):
        rows.setdefault((method, json.dumps(settings)), {}).setdefault(clients, []).append(value)
    best: dict[str, Any] = {}
    with arguments.csv.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "settings", *(f"clients_{k}" for k in CLIENTS), "mean"])
        for (method, settings), by_clients in rows.items():
            means = [sum(v) / len(v) for v in by_clients.values()]
            score = sum(means) / len(means)
            writer.writerow([method, settings, *(f"{m:.4f}" for m in means), f"{score:.4f}"])
            if method not in best or score > best[method][0]:
                best[method] = (score, json.loads(settings))
    text = yaml.safe_dump(
        {method: settings for method, (_, settings) in best.items()}, sort_keys=False
    )
    arguments.out.write_text(
        "# Made by python -m benchmarks.tuning; validation data only.\n" + text
    )


if __name__ == "__main__":
    main()
