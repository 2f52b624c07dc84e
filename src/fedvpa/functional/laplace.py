"""Laplace's approximation to a user's posterior under a mixture prior, where the reward is linear
in z (M9), and what follows from it in closed form (nats).

A comparison with features dh has the log-odds a + x . z, a = w . dh (its *offset*) and x = W dh
(its *design*); a target below is a comparison as well.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

STEPS = 4
"""Newton steps from a component's centre; the log-posterior is concave."""
LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.0)
"""Lengths that a step tries where its full one overshoots."""
PROBIT = math.pi / 8
"""MacKay (1992, eq. 20): sigmoid averaged over N(a, s2) is about sigmoid(a / sqrt(1 + pi s2/8))."""


class Laplace(NamedTuple):
    """A Gaussian per component: mode, covariance, and the log-evidence of the comparisons. A
    covariance without axes stands for points."""

    mode: Float[Tensor, "*b m d"]
    covariance: Float[Tensor, "*b m d d"]
    evidence: Float[Tensor, "*b m"]


def laplace(
    offset: Float[Tensor, "*b n"],
    design: Float[Tensor, "*b n d"],
    weight: Float[Tensor, "*b n"],
    centre: Float[Tensor, "*#b m d"],
    variance: Float[Tensor, "*#b m"],
    steps: int = STEPS,
) -> Laplace:
    """Posterior of z for every user and component (M9).

    Args:
        offset: log-odds of the comparisons under z = 0.
        design: their derivative with respect to z.
        weight: 1 for a comparison of the context, 0 for any other row.
        centre: centres of the components.
        variance: spherical variances of the components.
        steps: Newton steps.
    """
    # 1. Newton from the centres, all users and components side by side.
    weight, precision = weight.unsqueeze(-2), variance.reciprocal().unsqueeze(-1)
    z = centre.expand(*offset.shape[:-1], *centre.shape[-2:])
    margin = offset.unsqueeze(-2) + z @ design.mT
    value = _objective(margin, z, weight, centre, precision)
    for _ in range(steps):
        factor = torch.linalg.cholesky(_hessian(margin, design, weight, precision))
        slope = (torch.sigmoid(-margin) * weight) @ design - (z - centre) * precision
        step = torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)
        along = step @ design.mT
        tried = _objective(margin + along, z + step, weight, centre, precision)
        over = tried < value  # a full step overshoots where choices are nearly certain
        if over.any():  # the others' step must not depend on who is computed beside them
            short = _shortened(margin, z, step, along, weight, centre, precision)
            row = over.unsqueeze(-1)
            step, along = torch.where(row, short[0], step), torch.where(row, short[1], along)
            tried = torch.where(over, short[2], tried)
        z, margin, value = z + step, margin + along, tried
    # 2. Curvature and evidence at the modes.
    factor = torch.linalg.cholesky(_hessian(margin, design, weight, precision))
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    quadratic = ((z - centre).square() * precision).sum(-1)
    occam = z.shape[-1] * variance.log() + log_det
    evidence = (logsigmoid(margin) * weight).sum(-1) - 0.5 * (quadratic + occam)
    return Laplace(z, torch.cholesky_inverse(factor), evidence)


def _objective(
    margin: Tensor, z: Tensor, weight: Tensor, centre: Tensor, precision: Tensor
) -> Float[Tensor, "*b m"]:
    """Log-posterior of z, but for a constant."""
    prior = 0.5 * ((z - centre).square() * precision).sum(-1)
    return (logsigmoid(margin) * weight).sum(-1) - prior


def _shortened(
    margin: Tensor, z: Tensor, step: Tensor, along: Tensor, weight: Tensor, centre: Tensor,
    precision: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The best of several lengths of a step, for each user and component; margins are linear along
    it."""
    length = torch.tensor(LENGTHS).view(-1, *[1] * z.dim())
    tried = _objective(margin + length * along, z + length * step, weight, centre, precision)
    value, best = tried.max(0)
    factor = length.view(-1)[best].unsqueeze(-1)
    return factor * step, factor * along, value


def _hessian(margin: Tensor, design: Tensor, weight: Tensor, precision: Tensor) -> Tensor:
    """Negative second derivative of the log-posterior [*b, m, d, d]."""
    probability = torch.sigmoid(margin)
    curvature = (probability * (1 - probability) * weight).unsqueeze(-1)
    if probability.shape[-2] == 1:
        inner = ((design * curvature.squeeze(-3)).mT @ design).unsqueeze(-3)
    else:  # one product for all components
        d = design.shape[-1]
        inner = (curvature.squeeze(-1) @ _squares(design)).unflatten(-1, (d, d))
    return inner + torch.diag_embed(precision.expand(*inner.shape[:-1]))


def _squares(design: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n dd"]:
    """Products of the entries of every row."""
    return (design.unsqueeze(-1) * design.unsqueeze(-2)).flatten(-2)


def at_centres(
    offset: Float[Tensor, "*b n"],
    design: Float[Tensor, "*b n d"],
    weight: Float[Tensor, "*b n"],
    centre: Float[Tensor, "*#b m d"],
) -> Laplace:
    """The posterior where the components are points: their evidence alone."""
    margin = offset.unsqueeze(-2) + centre @ design.mT
    evidence = (logsigmoid(margin) * weight.unsqueeze(-2)).sum(-1)
    mode = centre.expand(*evidence.shape, centre.shape[-1])
    return Laplace(mode, torch.zeros(()), evidence)


class Prediction(NamedTuple):
    """Log-odds of targets, averaged over each component's posterior, and what made them."""

    margin: Float[Tensor, "*b m n"]
    variance: Float[Tensor, "*b m n"]
    log_odds: Float[Tensor, "*b m n"]


def predicted(
    offset: Float[Tensor, "*b n"], design: Float[Tensor, "*b n d"], found: Laplace
) -> Prediction:
    """Log-odds of the targets under each component: sigmoids averaged over the posterior (probit
    approximation)."""
    margin = offset.unsqueeze(-2) + found.mode @ design.mT
    if not found.covariance.dim():
        return Prediction(margin, torch.zeros_like(margin), margin)
    if found.mode.shape[-2] == 1:
        variance = ((design @ found.covariance.squeeze(-3)) * design).sum(-1).unsqueeze(-2)
    else:
        variance = (_squares(design) @ found.covariance.flatten(-2).mT).mT
    return Prediction(margin, variance, margin * (1 + PROBIT * variance).rsqrt())


def mixed_log_odds(
    log_share: Float[Tensor, "*b m"], log_odds: Float[Tensor, "*b m n"]
) -> Float[Tensor, "*b n"]:
    """Log-odds under the mixture: probabilities are averaged, not rewards."""
    share = log_share.unsqueeze(-1)
    return torch.logsumexp(share + logsigmoid(log_odds), -2) - torch.logsumexp(
        share + logsigmoid(-log_odds), -2
    )


class Slope(NamedTuple):
    """Derivatives of the targets' negative log-likelihood: with respect to w a sum over targets of
    `offset` dh, with respect to W one of `design` dh^T."""

    loss: Float[Tensor, "*b n"]
    offset: Float[Tensor, "*b n"]
    design: Float[Tensor, "*b n d"]


def predictive_slope(
    found: Laplace, share: Float[Tensor, "*b m"], prediction: Prediction, design: Tensor
) -> Slope:
    """Of -log sum_m share_m sigmoid(log_odds_m), the posterior being held fixed."""
    odds = prediction.log_odds
    weighed = share.clamp_min(1e-30).log().unsqueeze(-1) + logsigmoid(odds)
    total = torch.logsumexp(weighed, -2)
    pull = (weighed - total.unsqueeze(-2)).exp() * torch.sigmoid(-odds)
    scale = (1 + PROBIT * prediction.variance).rsqrt()
    first = -pull * scale
    second = pull * prediction.margin * PROBIT * scale.pow(3)
    slope = first.mT @ found.mode
    if not found.covariance.dim():
        return Slope(-total, first.sum(-2), slope)
    d = design.shape[-1]
    curved = (second.mT @ found.covariance.flatten(-2)).unflatten(-1, (d, d))
    slope = slope + (curved @ design.unsqueeze(-1)).squeeze(-1)
    return Slope(-total, first.sum(-2), slope)


def sampled_slope(
    z: Float[Tensor, "s *b d"], offset: Float[Tensor, "*b n"], design: Float[Tensor, "*b n d"]
) -> Slope:
    """Of the mean over s samples of -log sigmoid(a + x . z): the reconstruction of an ELBO."""
    margin = offset + (design @ z.unsqueeze(-1)).squeeze(-1)
    pull = torch.sigmoid(-margin)
    slope = -(pull.unsqueeze(-1) * z.unsqueeze(-2)).mean(0)
    return Slope(-logsigmoid(margin).mean(0), -pull.mean(0), slope)


def mixture_divergence(
    found: Laplace,
    share: Float[Tensor, "*b m"],
    log_prior: Float[Tensor, "*#b m"],
    centre: Float[Tensor, "*#b m d"],
    variance: Float[Tensor, "*#b m"],
) -> Float[Tensor, "*b"]:
    """KL of component and z from the posterior to the prior (M5): the components' categorical
    one, and the expected Gaussian ones."""
    categorical = share.clamp_min(1e-30).log() - log_prior
    if not found.covariance.dim():
        return (share * categorical).sum(-1)
    latent = centre.shape[-1]
    trace = found.covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    squared = (found.mode - centre).square().sum(-1)
    log_det = torch.linalg.slogdet(found.covariance).logabsdet
    each = 0.5 * ((trace + squared) / variance - latent + latent * variance.log() - log_det)
    return (share * (each + categorical)).sum(-1)
