"""Accuracy against epsilon: client-level differential privacy, on personas.

python -m benchmarks.privacy [--clients 1000] [--seeds 3] [--method fedvpa-gp]: 50 rounds of a tenth
of the clients on average, whitening by public pairs of other users; accuracy on pairs that the
clients hold out. The noise for every epsilon is what `fedvpa privacy plan` says. Number of inputs,
order, clip and noise of the last sum (of fedvpl+anchors, clip and noise of the fit) were chosen on
clients of seed 9; the figures are of seeds from 0 on.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks.population import accuracy, configuration, prepare
from fedvpa.config import merged
from fedvpa.evaluation.statistics import interval
from fedvpa.experiment.build import build_method
from fedvpa.federated.accounting import noise_for, privacy_of
from fedvpa.federated.algorithm import poisson_cohort
from fedvpa.federated.bayes.server import FederatedBayes
from fedvpa.federated.random import stream
from fedvpa.federated.variational import FederatedVariational
from fedvpa.files import plain_json

ROUNDS = 50


def settings(method: str, clients: int, epsilon: float) -> dict[str, Any]:
    """Settings that spend epsilon in the whole run; infinity: neither bounds nor noise."""
    given: dict[str, Any] = {
        "method": method,
        "federation": {"rounds": ROUNDS, "cohort": clients // 10},
        "data": {"public": "personas"},
    }
    if method != "fedvpa-gp":
        given |= {"prior": {"kind": "components"}, "prototypes": {"modes": 2}}
    if math.isinf(epsilon):
        return given
    given["privacy"] = {"enabled": True}
    privacy = privacy_of(configuration(clients, given), clients)
    assert privacy is not None
    given["privacy"]["noise"] = noise_for(privacy, ROUNDS, privacy.fits, epsilon)
    return given


def run(clients: int, seed: int, given: dict[str, Any]) -> tuple[float, float]:
    """Accuracy and what was spent."""
    given = merged(given, {"seed": seed})
    config, data = configuration(clients, given), prepare(clients, seed, given)
    algorithm, simulated = build_method(config, data.train)
    assert isinstance(algorithm, FederatedVariational | FederatedBayes)
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
    parser.add_argument("--method", default="fedvpa-gp", choices=["fedvpa-gp", "fedvpl+anchors"])
    parser.add_argument("--clients", default="1000", help="numbers of clients, with commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epsilons", default="inf,8,4,2,1")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    epsilons = [float(e) for e in arguments.epsilons.split(",")]
    for clients in (int(n) for n in arguments.clients.split(",")):
        for epsilon in epsilons:
            given = settings(arguments.method, clients, epsilon)
            found = [run(clients, seed, given) for seed in seeds]
            mean = interval([a for a, _ in found])
            noise = given.get("privacy", {}).get("noise", 0.0)
            rows.append({
                "method": arguments.method, "clients": clients, "epsilon": epsilon,
                "spent": found[0][1], "noise": noise, "accuracy": mean,
            })  # fmt: skip
            print(
                f"{clients} clients, epsilon {epsilon:g} (noise {noise:.2f}): {mean['mean']:.3f}"
                f" [{mean['low']:.3f}, {mean['high']:.3f}]",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_bytes(plain_json(rows))


if __name__ == "__main__":
    main()
