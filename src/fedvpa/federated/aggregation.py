"""From clients' updates to the next shared model: a weighted mean, then a server optimiser (Reddi et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.types import Params


@dataclass
class WeightedMean:
    """Running sum of weighted updates; chunks are added in the order of the cohort (FedAvg, McMahan et al., 2017)."""

    sums: Params = field(default_factory=dict)
    total: float = 0.0

    def add(self, start: Params, trained: Params, weight: Float[Tensor, "c"]) -> None:
        """Add weight_c (trained_c - start) of every client c of a chunk."""
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
        return {f"{kind}/{name}": torch.zeros_like(value) for kind in kinds for name, value in params.items()}

    def apply(self, params: Params, slots: Params, update: Params) -> tuple[Params, Params]:
        """New parameters and moments."""
        if self.kind == "average":
            return {name: params[name] + self.learning_rate * update[name] for name in params}, slots
        first = {name: self.beta1 * slots[f"m/{name}"] for name in params}
        if self.kind == "momentum":
            first = {name: first[name] + update[name] for name in params}
            new = {name: params[name] + self.learning_rate * first[name] for name in params}
            return new, {f"m/{name}": value for name, value in first.items()}
        first = {name: first[name] + (1 - self.beta1) * update[name] for name in params}
        second = {name: self.beta2 * slots[f"v/{name}"] + (1 - self.beta2) * update[name].square() for name in params}
        new = {name: params[name] + self.learning_rate * first[name] / (second[name].sqrt() + self.epsilon) for name in params}
        return new, {f"m/{n}": v for n, v in first.items()} | {f"v/{n}": v for n, v in second.items()}
