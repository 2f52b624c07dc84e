"""How well the server, or a peer, infers a client's group, or whether a pair is among a client's,
from what it sees.

python -m benchmarks.attacks [--clients 100] [--seeds 3]: areas under the ROC curve (1/2: nothing is
learned), 95 % intervals over seeds. Attacks are unsupervised: nothing is known of anybody's group,
and an area below 1/2 is turned around, so that guessing is a little above 1/2 as well; `chance`
says how much.

* group, server: the first principal component of what it holds of each client (posterior means;
  else the mean of the updates it can tell apart: of the client itself, or of the rounds that the
  client took part in).
* group, peer: the same of what is broadcast.
* membership, server: the alignment of these updates of the reward with the pair, which was trained
  on or held out.
* membership, peer: the alignment of the shared reward's whole movement with the pair.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.population import Data, accuracy, configuration, prepare
from fedvpa.config import merged
from fedvpa.evaluation.statistics import interval
from fedvpa.experiment.build import build_method
from fedvpa.federated.accounting import Privacy, privacy_of
from fedvpa.federated.algorithm import poisson_cohort, sample_cohort
from fedvpa.federated.clients import SimulatedClients
from fedvpa.federated.components import Moments
from fedvpa.federated.messages import Broadcast, Update
from fedvpa.federated.random import stream
from fedvpa.federated.variational import FederatedVariational
from fedvpa.files import plain_json
from fedvpa.types import Params

COMPONENTS: dict[str, Any] = {"prior": {"kind": "components"}}
PRIVATE: dict[str, Any] = COMPONENTS | {
    "data": {"public": "personas"},
    "privacy": {"enabled": True, "noise": 1.0, "fit_noise": 10.0},
}
PROTECTIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "peers": ({"method": "fedvpl+mix", "prior": {"kind": "peers"}}, False),
    "components": (COMPONENTS, False),
    "components + secure sums": (COMPONENTS, True),
    "components + secure sums + DP": (PRIVATE, True),
}
"""Settings, and whether single updates are hidden."""


@dataclass
class Transcript:
    """Passes everything on to the clients, and writes down what the server sees."""

    inner: SimulatedClients
    summed: bool
    rounds: list[tuple[list[int], Tensor, Tensor]] = field(default_factory=list)
    posterior: dict[int, Tensor] = field(default_factory=dict)
    broadcasts: list[Broadcast] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def train(
        self, broadcast: Broadcast, cohort: Sequence[int], tables: Params
    ) -> Iterator[tuple[Tensor, Update]]:
        """One round; rewards' and all updates of each client, or of the round."""
        self.broadcasts.append(broadcast)
        clients: list[int] = []
        flat, reward = [], []
        for index, update in self.inner.train(broadcast, cohort, tables):
            clients += index.tolist()
            moved = {n: v - broadcast.params[n] for n, v in update.params.items()}
            flat.append(torch.cat([v.flatten(1) for v in moved.values()], 1))
            reward.append(moved["reward.weight"])
            if update.posterior is not None:
                self.posterior |= dict(zip(index.tolist(), update.posterior.mean))
            yield index, update
        all_of, rewards = torch.cat(flat), torch.cat(reward)
        if self.summed:
            all_of, rewards = all_of.sum(0, keepdim=True), rewards.sum(0, keepdim=True)
        self.rounds.append((clients, all_of, rewards))

    def moments(self, params: Params, centre: Tensor, *, withhold: bool = False) -> Moments:
        """Asked of each client, these are its latent; only a secure sum hides them from the
        server."""
        if not self.summed:
            index, posterior = self.inner.posteriors(params, withhold=withhold)
            self.posterior |= dict(zip(index.tolist(), posterior.mean))
        return self.inner.moments(params, centre, withhold=withhold)

    def of_each(self, part: int) -> Tensor:
        """What the server can hold against each client: the mean of its updates less that of the
        others in the round, or of the sums of the rounds it took part in less that of all rounds.
        """
        if self.summed:
            sums = torch.stack([row[part][0] for row in self.rounds])
            present = torch.zeros(len(self.rounds), len(self))
            for r, (clients, _, _) in enumerate(self.rounds):
                present[r, clients] = 1
            centred = present - present.mean(0)
            ridge = centred.T @ centred + 1e-3 * torch.eye(len(self))
            # least squares: who moves the sum how
            return torch.linalg.solve(ridge, centred.T @ (sums - sums.mean(0)))
        total, count = (
            torch.zeros(len(self), self.rounds[0][part].shape[1]),
            torch.zeros(len(self), 1),
        )
        for row in self.rounds:
            total[row[0]] += row[part] - row[part].mean(0)
            count[row[0]] += 1
        return total / count.clamp_min(1)


def first_component(rows: Tensor) -> Tensor:
    """Coordinates on the first principal component."""
    centred = (rows - rows.mean(0)).double()
    return (torch.linalg.svd(centred, full_matrices=False)[0][:, 0]).float()


def area(label: Tensor, score: Tensor) -> float:
    """Area under the ROC curve, whichever way round is better."""
    found = float(roc_auc_score(label.numpy(), score.numpy()))
    return max(found, 1 - found)


def membership(data: Data, directions: Tensor) -> float:
    """Mean area over clients: their own pairs against those that they hold out, by alignment with a
    direction each."""
    found = []
    for k in range(len(data.train)):
        own, held = data.train.batch([k]), data.held.batch([k])
        if not held.mask.any():  # what it holds out, another client trains on
            continue
        inside, outside = (
            own.difference[0][own.mask[0]] @ directions[k],
            held.difference[0][held.mask[0]] @ directions[k],
        )
        label = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))])
        found.append(float(roc_auc_score(label.numpy(), torch.cat([inside, outside]).numpy())))
    return sum(found) / len(found)


def attack(name: str, clients: int, seed: int) -> dict[str, float]:
    """Train under a protection, and attack what was seen."""
    settings, summed = PROTECTIONS[name]
    given = {"seed": seed, "federation": {"rounds": 50, "cohort": clients // 5}}
    config = configuration(clients, merged(given, settings))
    data = prepare(clients, seed)
    algorithm, simulated = build_method(config, data.train)
    assert isinstance(algorithm, FederatedVariational)
    seen = Transcript(simulated, summed)
    state = algorithm.init(data.train.roster)
    start = state.params["reward.weight"]
    privacy = privacy_of(config, clients)
    epsilon = float("nan")
    for r in range(config.federation.rounds):
        if privacy is not None:
            cohort = poisson_cohort(stream(seed, "cohort", r), clients, privacy.rate)
        else:
            cohort = sample_cohort(seed, r, clients, config.federation.cohort)
        state, row = algorithm.apply(state, seen, cohort)
        epsilon = row.get("epsilon", epsilon)
    # what the server publishes, or keeps if the noise is added before it sees the sum
    if privacy is not None:
        noisy = [
            (c, _noised(a, privacy, seed, r), _noised(w, privacy, seed, r))
            for r, (c, a, w) in enumerate(seen.rounds)
        ]
        seen.rounds = noisy
    final = algorithm.finalise(state, seen)
    held = (
        torch.stack([seen.posterior[k] for k in range(clients)])
        if len(seen.posterior) == clients
        else seen.of_each(1)
    )
    prior = seen.broadcasts[-1].prior
    told = torch.zeros(clients)
    # a peer is told everybody's posterior, with a name on it
    if prior is not None and (prior.client >= 0).all():
        told[prior.client] = first_component(prior.mean)
    moved = (final.params["reward.weight"] - start).expand(clients, -1)
    return {
        "group, server": area(data.group, first_component(held)),
        "group, peer": area(data.group, told),
        "membership, server": membership(data, seen.of_each(2)),
        "membership, peer": membership(data, moved),
        "accuracy": accuracy(algorithm, final, data),
        "epsilon": epsilon,
        "chance": area(data.group, torch.randn(clients, generator=stream(seed, "chance"))),
    }


def _noised(sums: Tensor, privacy: Privacy, seed: int, r: int) -> Tensor:
    return sums + privacy.noise * privacy.clip * torch.randn(
        sums.shape, generator=stream(seed, "seen", r, sums.shape[1])
    )


def main() -> None:
    """Every protection, every seed; a table, and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    for name in PROTECTIONS:
        runs = [attack(name, arguments.clients, seed) for seed in range(arguments.seeds)]
        results[name] = {key: interval([run[key] for run in runs]) for key in runs[0]}
        cells = [
            f"{key} {v['mean']:.2f} [{v['low']:.2f}, {v['high']:.2f}]"
            for key, v in results[name].items()
        ]
        print(f"{name}: " + "; ".join(cells))
    if arguments.json:
        arguments.json.write_bytes(plain_json(results))


if __name__ == "__main__":
    main()
