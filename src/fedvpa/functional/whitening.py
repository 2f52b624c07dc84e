"""Whitening in difference space from per-client sums: no label leaves a client, and features only
as sums.

(The sum of a client with few pairs still tells their span; only the sum over clients is needed, so
it can be aggregated securely.)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def second_moment(difference: Float[Tensor, "n h"]) -> Float[Tensor, "h h"]:
    """Sum over pairs of dh dh^T, in float64: the same for a pair and its reversal, so that it says
    nothing of the choice."""
    wide = difference.double()
    return wide.T @ wide


def whitening_matrix(
    moment: Float[Tensor, "h h"], pairs: int, dimensions: int, white: bool = True
) -> Float[Tensor, "h p"]:
    """Projection onto the leading directions of the differences, each scaled to unit mean square;
    or (not `white`) the first alone, and the others as they are beside it.

    Signs are fixed (largest entry positive), so that the result does not depend on the
    eigensolver's whim. Where the differences span fewer than `dimensions` directions the remaining
    columns are zero.

    Raises:
        ValueError: no pairs.
    """
    if pairs < 1:
        raise ValueError("whitening needs at least one pair")
    values, vectors = torch.linalg.eigh(moment.double() / pairs)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = min(dimensions, int((values > 1e-8 * values[0]).sum()))
    values, vectors = values[:kept], vectors[:, :kept]
    largest = vectors.abs().argmax(0)
    vectors = vectors * vectors[largest, torch.arange(kept)].sign()
    scaled = vectors / (values if white else values[0]).sqrt()
    padded = torch.zeros(moment.shape[0], dimensions, dtype=torch.float64)
    padded[:, :kept] = scaled
    return padded.float()
