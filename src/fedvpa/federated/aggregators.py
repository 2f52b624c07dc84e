"""From clients' updates to the next shared model: a weighted mean, then a server optimiser
(Reddi et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.types import Params


@dataclass
class WeightedMean:
    """Running sum of weighted updates; chunks are added in the order of the cohort (FedAvg,
    McMahan et al., 2017)."""

    sums: Params = field(default_factory=dict)
    total: float = 0.0
    max_norm: float = 0.0

    def add(self, start: Params, trained: Params, weight: Float[Tensor, "c"]) -> None:
        """Add weight_c (trained_c - start) of every client c of a chunk."""
        if self.max_norm:
            trained = bounded(start, trained, self.max_norm)
        for name, origin in start.items():
            flat = trained[name].flatten(1)
            update = (weight @ flat).view_as(origin) - weight.sum() * origin
            self.sums[name] = update if name not in self.sums else self.sums[name] + update
        self.total += float(weight.sum())

    def mean(self) -> Params:
        """The mean update.

        Raises:
            ValueError: nothing was added.
        """
        if self.total <= 0:
            raise ValueError("no client sent an update")
        return {name: value / self.total for name, value in self.sums.items()}


def bounded(start: Params, trained: Params, norm: float) -> Params:
    """Every client's parameters [c, ...], their distance from `start` at most `norm` in all
    (L2): norm bounding (Sun et al., 2019, arXiv 1911.07963), and the clipping of differential
    privacy."""
    squared = sum(
        ((trained[n] - start[n]).flatten(1).square().sum(1) for n in start), torch.zeros(())
    )
    factor = (norm / squared.sqrt().clamp_min(1e-12)).clamp_max(1.0)
    return {
        n: value
        if n not in start
        else start[n] + (value - start[n]) * factor.view(-1, *[1] * start[n].dim())
        for n, value in trained.items()
    }


@dataclass
class RobustMean:
    """A mean that a share of attackers cannot carry away; every client counts the same.

    * `trimmed-mean`: of each coordinate, without its highest and lowest `share` (Yin et al., 2018,
      definition 2);
    * `median`: of each coordinate (the same, definition 1);
    * `krum`: of the clients that are nearest to their neighbours, all but `share` of them
      (Multi-Krum; Blanchard et al., 2017).
    """

    kind: Literal["trimmed-mean", "median", "krum"]
    share: float = 0.2
    max_norm: float = 0.0
    _updates: list[Params] = field(default_factory=list)

    def add(self, start: Params, trained: Params, weight: Float[Tensor, "c"]) -> None:
        """Keep trained_c - start of every client c of a chunk; weights are not read."""
        if self.max_norm:
            trained = bounded(start, trained, self.max_norm)
        self._updates.append({name: trained[name] - origin for name, origin in start.items()})

    def mean(self) -> Params:
        """The robust mean update.

        Raises:
            ValueError: nothing was added.
        """
        if not self._updates:
            raise ValueError("no client sent an update")
        all_of = {name: torch.cat([u[name] for u in self._updates]) for name in self._updates[0]}
        clients = next(iter(all_of.values())).shape[0]
        cut = min(int(self.share * clients), (clients - 1) // 2)
        if self.kind == "median":
            return {name: value.quantile(0.5, 0) for name, value in all_of.items()}
        if self.kind == "trimmed-mean":
            return {
                name: value.sort(0).values[cut : clients - cut].mean(0)
                for name, value in all_of.items()
            }
        kept = nearest_to_others(torch.cat([value.flatten(1) for value in all_of.values()], 1), cut)
        return {name: value[kept].mean(0) for name, value in all_of.items()}


def nearest_to_others(updates: Float[Tensor, "c p"], attackers: int) -> Tensor:
    """Indices of the `c - attackers` rows with the least sum of squared distances to their c -
    attackers - 2 nearest others (the Krum score)."""
    clients = updates.shape[0]
    if clients - attackers < 3:
        return torch.arange(clients)
    distance = torch.cdist(updates, updates).square().fill_diagonal_(torch.inf)
    score = distance.sort(1).values[:, : clients - attackers - 2].sum(1)
    return score.argsort()[: clients - attackers].sort().values


@dataclass(frozen=True)
class ServerOptimiser:
    """Applies the mean update as a pseudo-gradient: FedAvg, FedAvgM or FedAdam."""

    kind: Literal["average", "momentum", "adam"] = "average"
    learning_rate: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-3

    def init(self, params: Params) -> Params:
        """Zero moments."""
        kinds = {"average": (), "momentum": ("m",), "adam": ("m", "v")}[self.kind]
        return {
            f"{kind}/{name}": torch.zeros_like(value)
            for kind in kinds
            for name, value in params.items()
        }

    def apply(self, params: Params, slots: Params, update: Params) -> tuple[Params, Params]:
        """New parameters and moments."""
        if self.kind == "average":
            return {
                name: params[name] + self.learning_rate * update[name] for name in params
            }, slots
        first = {name: self.beta1 * slots[f"m/{name}"] for name in params}
        if self.kind == "momentum":
            first = {name: first[name] + update[name] for name in params}
            new = {name: params[name] + self.learning_rate * first[name] for name in params}
            return new, {f"m/{name}": value for name, value in first.items()}
        first = {name: first[name] + (1 - self.beta1) * update[name] for name in params}
        second = {
            name: self.beta2 * slots[f"v/{name}"] + (1 - self.beta2) * update[name].square()
            for name in params
        }
        new = {
            name: params[name]
            + self.learning_rate * first[name] / (second[name].sqrt() + self.epsilon)
            for name in params
        }
        return new, {f"m/{n}": v for n, v in first.items()} | {
            f"v/{n}": v for n, v in second.items()
        }
