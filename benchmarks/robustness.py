"""Accuracy of the honest clients against the share of attackers, by aggregator: personas,
fedvpa-gp.

python -m benchmarks.robustness [--clients 100] [--seeds 3]. Attackers, whose share is what the
aggregators are told of:

* `sign-flip`: send the update that they were to send, reversed and five times as long;
* `noise`: send Gaussian noise ten times as long as their update;
* `label-flip`: train on their pairs with every label reversed;
* `whitening`: tell of second moments twenty times as large as the others' (as much as is taken from
  anybody), along directions that mean nothing; the clients are whitened by their own sums;
* `latents`: tell of latents ten times as far out as the prior has them (as much as is taken from
  anybody), all in one direction, whenever components are fitted.

A bound on norms is one of updates, so that the mean with it is left out of the last two.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.population import Data, accuracy, configuration, prepare
from fedvpa.config import Config
from fedvpa.evaluation.statistics import interval
from fedvpa.experiment.build import build_method
from fedvpa.features.whitening import Whitener, WhiteningSums
from fedvpa.federated.aggregators import robust_of
from fedvpa.federated.algorithm import sample_cohort
from fedvpa.federated.clients import SimulatedClients
from fedvpa.federated.components import Moments, assignments, summed_moments
from fedvpa.federated.messages import Broadcast, Update
from fedvpa.federated.random import stream
from fedvpa.federated.robust import robust_moments, robust_whitening
from fedvpa.federated.variational import FederatedVariational
from fedvpa.files import plain_json
from fedvpa.network.checks import PLAUSIBLE_DEVIATIONS, TIMES
from fedvpa.types import Params

AGGREGATORS: dict[str, dict[str, Any]] = {
    "mean": {},
    "mean, norm bound 0.5": {"max_norm": 0.5},
    "trimmed-mean": {"aggregator": "trimmed-mean"},
    "median": {"aggregator": "median"},
    "krum": {"aggregator": "krum"},
}
ATTACKS = ("sign-flip", "noise", "label-flip", "whitening", "latents")
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)


@dataclass
class Poisoned:
    """Clients some of whom answer otherwise than they should."""

    inner: SimulatedClients
    attackers: frozenset[int]
    kind: str
    seed: int

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def train(
        self, broadcast: Broadcast, cohort: Sequence[int], tables: Params
    ) -> Iterator[tuple[Tensor, Update]]:
        """One round, with the attackers' answers changed."""
        for index, update in self.inner.train(broadcast, cohort, tables):
            bad = torch.tensor([int(c) in self.attackers for c in index])
            params = {}
            for name, value in update.params.items():
                start, rows = broadcast.params[name], bad.view(-1, *[1] * (value.dim() - 1))
                changed = start - 5 * (value - start)
                if self.kind == "noise":
                    noise = torch.randn(
                        value.shape,
                        generator=stream(self.seed, broadcast.round, name, int(index[0])),
                    )
                    changed = start + 10 * (value - start).abs().mean() * noise
                params[name] = torch.where(rows, changed, value)
            yield index, update if self.kind == "label-flip" else update._replace(params=params)

    def moments(self, params: Params, centre: Tensor, *, withhold: bool = False) -> Moments:
        """Moments under given centres, with the attackers' latents changed."""
        _, found = self.inner.posteriors(params, withhold=withhold)
        mean, variance = found.mean.clone(), found.log_var.exp()
        if self.kind == "latents":
            far = torch.randn(mean.shape[-1], generator=stream(self.seed, "far"))
            far *= PLAUSIBLE_DEVIATIONS * mean.shape[-1] ** 0.5 / far.norm()
            mean[sorted(self.attackers)] = far
        if self.inner.robust is None:
            return summed_moments(mean, variance, centre)
        robust = self.inner.robust
        return robust_moments(assignments(mean, centre), mean, variance, centre, robust)


def whitened(data: Data, config: Config, attackers: Sequence[int], seed: int) -> Data:
    """The clients, whitened by what they tell of their features."""
    sums = [WhiteningSums.of(own) for own in data.features]
    width = sums[0].moment.shape[0]
    random = torch.randn(width, 64, generator=stream(seed, "directions"), dtype=torch.float64)
    useless = torch.linalg.qr(random)[0]
    for c in attackers:
        size = TIMES * sums[c].moment.trace() / 64
        sums[c] = sums[c]._replace(moment=size * useless @ useless.T)
    robust = robust_of(config)
    total = (
        WhiteningSums(*(torch.stack(part).sum(0) for part in zip(*sums)))
        if robust is None
        else robust_whitening(sums, robust)
    )
    return data.whitened_by(Whitener.from_sums(total, config.model.inputs, config.model.white))


def run(data: Data, kind: str, aggregator: dict[str, Any], share: float, seed: int) -> float:
    """Accuracy of those who are honest."""
    clients = len(data.train)
    federation = {"rounds": 50, "cohort": clients // 2, **aggregator}
    if aggregator.get("aggregator") in ("trimmed-mean", "krum"):
        federation["trim"] = min(0.45, max(0.1, share))
    config = configuration(
        clients, {"seed": seed, "prior": {"kind": "components"}, "federation": federation}
    )
    chosen = torch.randperm(clients, generator=stream(seed, "attackers"))[
        : round(share * clients)
    ].tolist()
    if kind == "whitening":
        data = whitened(data, config, chosen, seed)
    store = data.train
    if kind == "label-flip":
        difference = store.difference.clone()
        for c in chosen:
            difference[int(store.offset[c]) : int(store.offset[c + 1])] *= -1
        store = replace(store, difference=difference)
    algorithm, simulated = build_method(config, store)
    assert isinstance(algorithm, FederatedVariational)
    poisoned = Poisoned(simulated, frozenset(chosen), kind, seed)
    state = algorithm.init(store.roster)
    for r in range(config.federation.rounds):
        cohort = sample_cohort(seed, r, clients, config.federation.cohort)
        state, _ = algorithm.apply(state, poisoned, cohort)
    honest = [c for c in range(clients) if c not in set(chosen)]
    return accuracy(algorithm, algorithm.finalise(state, poisoned), data, honest)


def main() -> None:
    """The table, and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sets = {seed: prepare(arguments.clients, seed) for seed in range(arguments.seeds)}
    rows = []
    for kind in arguments.attacks:
        print(f"{kind}: share of attackers {', '.join(map(str, SHARES))}")
        for name, aggregator in AGGREGATORS.items():
            if kind in ("whitening", "latents") and "max_norm" in aggregator:
                continue
            cells = []
            for share in SHARES:
                found = interval(
                    [run(data, kind, aggregator, share, seed) for seed, data in sets.items()]
                )
                rows.append({"attack": kind, "aggregator": name, "share": share, "accuracy": found})
                cells.append(f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]")
            print(f"  {name}: " + "; ".join(cells), flush=True)
    if arguments.json:
        arguments.json.write_bytes(plain_json(rows))


if __name__ == "__main__":
    main()
