"""What chooses between responses on the server: a selector, or one reward for everybody."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.experiment.run import Run, open_run
from fedvpa.experiment.use import PreferenceModel, against_average
from fedvpa.features.cache import FeatureCache
from fedvpa.records import Item


class SharedRewardModel:
    """A finished run of `fedavg-btl`: one reward for everybody. It stands where a `PreferenceModel`
    does, as the monolithic baseline, with one preference, `shared`, whose z has no dimension."""

    latent = 0

    def __init__(self, run: Run) -> None:
        self.run = run
        self._cache = FeatureCache(run.config.features)
        self.prototypes: Float[Tensor, "1 0"] | None = torch.zeros(1, 0)
        self.neutral: Float[Tensor, "0"] = torch.zeros(0)
        self.posterior_means: Float[Tensor, "k 0"] | None = None
        self.component_groups: list[str | None] = ["shared"]
        self.directions: int | None = None

    def score(self, items: Sequence[Item], z: Float[Tensor, "*n d"]) -> Float[Tensor, "n"]:
        """Reward of each response, relative to the average training response; z is not read."""
        predictor = self.run.predictor
        return predictor.margin(
            predictor.neutral(len(items)), against_average(self.run, self._cache, items)
        )[:, 0]


Selector = PreferenceModel | SharedRewardModel
"""What chooses between responses on the server."""


def open_selector(directory: str | Path) -> Selector:
    """A finished run of a variational method, or of `fedavg-btl`.

    Raises:
        BadInputError: no run there, or one of another method.
    """
    run = open_run(directory)
    return (
        SharedRewardModel(run)
        if run.config.entry.role == "monolithic"
        else PreferenceModel(directory)
    )
