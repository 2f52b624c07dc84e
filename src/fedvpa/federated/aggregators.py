"""From clients' updates to the next shared model: an aggregator, then a server optimiser (Reddi et
al., 2021)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.config import Config
from fedvpa.parts import AGGREGATORS, builder, part
from fedvpa.types import Params


@dataclass(frozen=True)
class Total:
    """What an aggregator knows of the updates so far: their weighted sum, or each of them."""

    sums: Params = field(default_factory=dict)
    weight: float = 0.0
    each: tuple[Params, ...] = ()


@runtime_checkable
class Aggregator(Protocol):
    """Makes one update of many; chunks of clients are added in the order of the cohort.

    A builder of one is called with ``config=`` alone.
    """

    def add(
        self, total: Total, start: Params, trained: Params, weight: Float[Tensor, "c"]
    ) -> Total:
        """The total with `trained` - `start` of the c clients of a chunk, `trained` [c, ...]."""
        ...

    def result(self, total: Total) -> Params:
        """The update of all.

        Raises:
            ValueError: nothing was added.
        """
        ...


def build_aggregator(config: Config) -> Aggregator:
    """The aggregator that the settings name (`federation.aggregator`)."""
    name = config.federation.aggregator
    aggregator: Aggregator = builder(part("aggregator", AGGREGATORS, name))(config=config)
    return aggregator


def robust_of(config: Config) -> RobustMean | None:
    """The aggregator of the settings where it withstands attackers: it then averages all that
    clients tell, not their updates alone."""
    aggregator = build_aggregator(config)
    return aggregator if isinstance(aggregator, RobustMean) else None


@dataclass(frozen=True)
class WeightedMean:
    """Weighted mean (FedAvg, McMahan et al., 2017), of updates of at most `max_norm` (0:
    of any norm)."""

    max_norm: float = 0.0

    def add(
        self, total: Total, start: Params, trained: Params, weight: Float[Tensor, "c"]
    ) -> Total:
        """Add weight_c (trained_c - start) of every client c of a chunk."""
        if self.max_norm:
            trained = bounded(start, trained, self.max_norm)
        sums: Params = {}
        for name, origin in start.items():
            flat = trained[name].flatten(1)
            update = (weight @ flat).view_as(origin) - weight.sum() * origin
            sums[name] = total.sums[name] + update if name in total.sums else update
        return Total(sums, total.weight + float(weight.sum()))

    def result(self, total: Total) -> Params:
        """The mean update.

        Raises:
            ValueError: nothing was added.
        """
        if total.weight <= 0:
            raise ValueError("no client sent an update")
        return {name: value / total.weight for name, value in total.sums.items()}


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


@dataclass(frozen=True)
class RobustMean(ABC):
    """A mean that a `share` of attackers cannot carry away; every client counts the same, and every
    update is kept until the end of the round."""

    share: float = 0.2
    max_norm: float = 0.0

    def add(
        self, total: Total, start: Params, trained: Params, weight: Float[Tensor, "c"]
    ) -> Total:
        """Keep trained_c - start of every client c of a chunk; weights are not read."""
        if self.max_norm:
            trained = bounded(start, trained, self.max_norm)
        update = {name: trained[name] - origin for name, origin in start.items()}
        return Total(weight=total.weight + float(weight.sum()), each=(*total.each, update))

    def result(self, total: Total) -> Params:
        """The robust mean update.

        Raises:
            ValueError: nothing was added.
        """
        if not total.each:
            raise ValueError("no client sent an update")
        return self.means({n: torch.cat([u[n] for u in total.each]) for n in total.each[0]})

    def means(self, values: Params) -> Params:
        """The robust means of anything that each of c clients has told, [c, ...]; norms are not
        bounded."""
        return self.of(values, self.attackers(next(iter(values.values())).shape[0]))

    def attackers(self, clients: int) -> int:
        """How many of so many clients are taken for attackers: always fewer than half."""
        return min(int(self.share * clients), (clients - 1) // 2)

    @abstractmethod
    def of(self, updates: Params, attackers: int) -> Params:
        """The mean of all clients' updates [c, ...], of which so many may be attacks."""


class TrimmedMean(RobustMean):
    """Of each coordinate, without its highest and lowest `share` (Yin et al., 2018, def. 2)."""

    def of(self, updates: Params, attackers: int) -> Params:
        """The mean of what is left."""
        return {
            name: value.sort(0).values[attackers : value.shape[0] - attackers].mean(0)
            for name, value in updates.items()
        }


class Median(RobustMean):
    """Of each coordinate (Yin et al., 2018, def. 1)."""

    def of(self, updates: Params, attackers: int) -> Params:
        """The medians."""
        return {name: value.quantile(0.5, 0) for name, value in updates.items()}


class Krum(RobustMean):
    """Of the clients that are nearest to their neighbours, all but `share` of them (Multi-Krum;
    Blanchard et al., 2017)."""

    def of(self, updates: Params, attackers: int) -> Params:
        """The mean of these clients."""
        flat = torch.cat([value.flatten(1) for value in updates.values()], 1)
        kept = nearest_to_others(flat, attackers)
        return {name: value[kept].mean(0) for name, value in updates.items()}


def nearest_to_others(updates: Float[Tensor, "c p"], attackers: int) -> Tensor:
    """Indices of the `c - attackers` rows with the least sum of squared distances to their c -
    attackers - 2 nearest others (the Krum score)."""
    clients = updates.shape[0]
    if clients - attackers < 3:
        return torch.arange(clients)
    distance = torch.cdist(updates, updates).square().fill_diagonal_(torch.inf)
    score = distance.sort(1).values[:, : clients - attackers - 2].sum(1)
    return score.argsort()[: clients - attackers].sort().values


def build_mean(*, config: Config) -> WeightedMean:
    """The weighted mean, of updates within the bound of the settings and that of privacy."""
    clip = config.privacy.clip if config.privacy.enabled else 0.0
    return WeightedMean(min((b for b in (config.federation.max_norm, clip) if b), default=0.0))


def build_trimmed_mean(*, config: Config) -> TrimmedMean:
    """The trimmed mean of the settings."""
    return TrimmedMean(config.federation.trim, config.federation.max_norm)


def build_median(*, config: Config) -> Median:
    """The median of the settings."""
    return Median(max_norm=config.federation.max_norm)


def build_krum(*, config: Config) -> Krum:
    """Multi-Krum of the settings."""
    return Krum(config.federation.trim, config.federation.max_norm)


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


def build_server(config: Config) -> ServerOptimiser:
    """The server optimiser of the settings."""
    f = config.federation
    return ServerOptimiser(f.server_optimiser, f.server_learning_rate)
