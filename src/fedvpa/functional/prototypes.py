"""Orthogonal prototypes of the preference modes (M6)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def orthogonal_prototypes(
    modes: int, latent: int, radius: float, generator: torch.Generator
) -> Float[Tensor, "m d"]:
    """Rows of length `radius`, orthogonal to one another, from the QR factors of a Gaussian matrix
    (M6).

    Raises:
        ValueError: more modes than latent dimensions.
    """
    if modes > latent:
        raise ValueError(f"{modes} orthogonal prototypes do not fit {latent} dimensions")
    q, r = torch.linalg.qr(torch.randn(latent, modes, generator=generator))
    return (radius * q * torch.diagonal(r).sign()).T.contiguous()


def pull_loss(
    latent: Float[Tensor, "*b d"], prototype: Float[Tensor, "*#b m d"], label: Int[Tensor, "*b"]
) -> Float[Tensor, "*b"]:
    """Squared distance to the labelled prototype; a label of -1 (none yet) costs nothing (M6)."""
    index = label.clamp_min(0)[..., None, None].expand(*label.shape, 1, latent.shape[-1])
    own = prototype.expand(*label.shape, -1, -1).gather(-2, index).squeeze(-2)
    return (latent - own).square().sum(-1) * (label >= 0)


def orthonormality_loss(prototype: Float[Tensor, "*b m d"], radius: float) -> Float[Tensor, "*b"]:
    """Squared Frobenius norm of P P^T / s^2 - I (M6, with P normalised by its radius s)."""
    unit = prototype / radius
    gram = unit @ unit.mT
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype)).square().sum((-2, -1))
