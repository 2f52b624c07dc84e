"""Whitening of features by sums over clients: what a federation knows of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedvpa.errors import CheckpointError
from fedvpa.functional.whitening import second_moment, whitening_matrix


class WhiteningSums(NamedTuple):
    """A client's part of the whitening, in float64: sum of dh dh^T, sum of h over both responses,
    number of pairs."""

    moment: Float[Tensor, "h h"]
    total: Float[Tensor, "h"]
    pairs: Float[Tensor, ""]

    @staticmethod
    def of(features: Float[Tensor, "n 2 h"]) -> WhiteningSums:
        """Over these pairs."""
        moment = second_moment(features[:, 0] - features[:, 1])
        count = torch.tensor(float(features.shape[0]), dtype=torch.float64)
        return WhiteningSums(moment, features.double().sum((0, 1)), count)


@dataclass(frozen=True)
class Whitener:
    """Centre [H] and projection [H, p], from sums over the training clients."""

    centre: Float[Tensor, "h"]
    projection: Float[Tensor, "h p"]

    @staticmethod
    def fit(features: Float[Tensor, "n 2 h"], dimensions: int) -> Whitener:
        """From the training pairs' features."""
        return Whitener.from_sums(WhiteningSums.of(features), dimensions)

    @staticmethod
    def from_sums(sums: WhiteningSums, dimensions: int) -> Whitener:
        """From the sum of the clients' sums: what a federation knows.

        Raises:
            ValueError: no pairs.
        """
        projection = whitening_matrix(sums.moment, round(float(sums.pairs)), dimensions)
        return Whitener((sums.total / (2 * sums.pairs)).float(), projection)

    @staticmethod
    def blank(width: int, dimensions: int) -> Whitener:
        """One that shows nothing, for its shapes."""
        return Whitener(torch.zeros(width), torch.zeros(width, dimensions))

    def difference(self, features: Float[Tensor, "n 2 h"]) -> Float[Tensor, "n p"]:
        """Whitened h(chosen) - h(rejected)."""
        return (features[:, 0] - features[:, 1]) @ self.projection

    def common(self, features: Float[Tensor, "n 2 h"]) -> Float[Tensor, "n p"]:
        """Whitened mean of both responses."""
        return (features.mean(1) - self.centre) @ self.projection

    def to_bytes(self) -> bytes:
        """The whitening as the bytes of a safetensors file."""
        return save({"centre": self.centre, "projection": self.projection})

    @staticmethod
    def read(path: Path) -> Whitener:
        """From a file.

        Raises:
            CheckpointError: missing or damaged.
        """
        try:
            return Whitener(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise CheckpointError(f"{path}: missing or damaged: {error}") from error
