"""Whitening of features by sums over clients: what a federation knows of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedvpa.errors import CheckpointError
from fedvpa.functional.whitening import second_moment, whitening_matrix
from fedvpa.types import digest_of


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
    def fit(features: Float[Tensor, "n 2 h"], dimensions: int, white: bool = True) -> Whitener:
        """From the training pairs' features."""
        return Whitener.from_sums(WhiteningSums.of(features), dimensions, white)

    @staticmethod
    def from_sums(sums: WhiteningSums, dimensions: int, white: bool = True) -> Whitener:
        """From the sum of the clients' sums: what a federation knows. Not `white`: principal
        components on one common scale.

        Raises:
            ValueError: no pairs.
        """
        projection = whitening_matrix(sums.moment, round(float(sums.pairs)), dimensions, white)
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

    def to_bytes(self, identity: str = "") -> bytes:
        """The whitening as the bytes of a safetensors file; `identity` names the run that it is
        of."""
        tensors = {"centre": self.centre.contiguous(), "projection": self.projection.contiguous()}
        return save(tensors, metadata={"fedvpa": identity, "digest": digest_of(tensors)})

    @staticmethod
    def read(path: Path, identity: str | None = None, dimensions: int = 0) -> Whitener:
        """From a file, of a certain run and with so many dimensions, if these are given.

        Raises:
            CheckpointError: missing, damaged, or of another run.
        """
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path}: missing or damaged: {error}") from error
        if set(found) != {"centre", "projection"}:
            raise CheckpointError(
                f"{path}: damaged: it holds {', '.join(sorted(found)) or 'nothing'}"
            )
        centre, projection = found["centre"], found["projection"]
        if (
            centre.dtype != torch.float32 or projection.dtype != torch.float32
            or centre.dim() != 1 or projection.dim() != 2 or projection.shape[0] != len(centre)
            or (dimensions and projection.shape[1] != dimensions)
        ):  # fmt: skip
            raise CheckpointError(
                f"{path}: damaged: centre {list(centre.shape)} and projection"
                f" {list(projection.shape)} do not fit each other or the settings"
            )
        if not (centre.isfinite().all() and projection.isfinite().all()):
            raise CheckpointError(f"{path}: damaged: it holds NaN or Inf")
        if told.get("digest") != digest_of(found):
            raise CheckpointError(f"{path}: damaged: it does not hold what was written")
        if identity is not None and told.get("fedvpa") != identity:
            raise CheckpointError(f"{path}: is of another run")
        return Whitener(centre, projection)
