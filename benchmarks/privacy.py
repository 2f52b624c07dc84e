"""Accuracy against epsilon: fedvpa-gp under client-level differential privacy, on personas.

python -m benchmarks.privacy [--clients 1000] [--seeds 3]: 50 rounds of a tenth of the clients on
average, whitening by public pairs, two components; accuracy on pairs that the clients hold out. The
noise for every epsilon is what `fedvpa privacy plan` says. Clip and noise of the fit were chosen on
clients of seed 9; the figures are of seeds from 0 on.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.population import accuracy, configuration, prepare
from fedvpa.config import merged
from fedvpa.evaluation.statistics import interval
from fedvpa.experiment.build import build_method
from fedvpa.federated.accounting import noise_for, privacy_of
from fedvpa.federated.algorithm import poisson_cohort
from fedvpa.federated.random import stream
from fedvpa.federated.variational import FederatedVariational
from fedvpa.files import plain_json

ROUNDS = 50


def settings(
    clients: int, seed: int, epsilon: float, clip: float, fit_noise: float
) -> dict[str, Any]:
    """Settings that spend epsilon in the whole run; infinity: neither bounds nor noise."""
    given: dict[str, Any] = {
        "seed": seed,
        "prior": {"kind": "components"},
        "federation": {"rounds": ROUNDS, "cohort": clients // 10},
    }
    if math.isinf(epsilon):
        return given
    given |= {
        "data": {"public": "personas"},
        "privacy": {"enabled": True, "clip": clip, "fit_noise": fit_noise},
    }
    privacy = privacy_of(configuration(clients, given), clients)
    assert privacy is not None
    given["privacy"]["noise"] = noise_for(replace(privacy, clients=clients), ROUNDS, 1, epsilon)
    return given


def run(clients: int, seed: int, given: dict[str, Any]) -> tuple[float, float]:
    """Accuracy and what was spent."""
    config = configuration(clients, merged(given, {"seed": seed}))
    data = prepare(clients, seed)
    algorithm, simulated = build_method(config, data.train)
    assert isinstance(algorithm, FederatedVariational)
    state, spent = algorithm.init(data.train.roster), math.inf
    for r in range(ROUNDS):
        cohort = poisson_cohort(stream(seed, "cohort", r), clients, 0.1)
        state, row = algorithm.apply(state, simulated, cohort)
        spent = row.get("epsilon", math.inf)
    return accuracy(algorithm, algorithm.finalise(state, simulated), data), spent


def main() -> None:
    """The curve, as a table and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--fit-noise", type=float, default=40.0)
    parser.add_argument("--epsilons", default="inf,8,4,2,1")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for epsilon in map(float, arguments.epsilons.split(",")):
        given = settings(arguments.clients, 0, epsilon, arguments.clip, arguments.fit_noise)
        seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        found = [run(arguments.clients, seed, given) for seed in seeds]
        mean, noise = interval([a for a, _ in found]), given.get("privacy", {}).get("noise", 0.0)
        rows.append({"epsilon": epsilon, "spent": found[0][1], "noise": noise, "accuracy": mean})
        print(
            f"epsilon {epsilon:g} (noise {noise:.2f}): {mean['mean']:.3f} [{mean['low']:.3f},"
            f" {mean['high']:.3f}]"
        )
    if arguments.json:
        arguments.json.write_bytes(plain_json(rows))


if __name__ == "__main__":
    main()
