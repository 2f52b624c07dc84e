"""What one client, or several side by side, infers from its own pairs under models that it is sent.

No gradient flows through a posterior, so that all is a few products of small matrices, without
autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedvpa.federated.bayes.messages import Slopes
from fedvpa.federated.bayes.models import Models, Width
from fedvpa.federated.content import Sides, outside
from fedvpa.functional.laplace import (
    Laplace,
    Slope,
    at_centres,
    laplace,
    mixed_log_odds,
    mixture_divergence,
    predicted,
    predictive_slope,
    sampled_slope,
)
from fedvpa.functional.mixture import gumbel_noise, gumbel_softmax_log_weight


class Chunk(NamedTuple):
    """Clients of like size: whitened differences, how they are divided, and their folds."""

    clients: list[int]
    names: list[str]
    difference: Float[Tensor, "c n p"]
    sides: Sides
    fold: Int[Tensor, "c n"]


class Dealt(NamedTuple):
    """The divisions of a round into context and targets, and the seeds of the samples."""

    context: Tensor
    target: Tensor
    noise: Tensor


@torch.no_grad()
def slopes_of(models: Models, chunk: Chunk, dealt: Dealt, *, samples: int, steps: int) -> Slopes:
    """Gradients of the targets' negative log-likelihood, and what the population step reads, a row
    per client: fields [t, c, ...].

    Args:
        models: t models of one structure.
        chunk: c clients.
        dealt: which of their pairs are context, and which are targets.
        samples: of z per division (0: the closed-form prediction).
        steps: Newton steps, where a posterior need not be exact.
    """
    m, d = models.shape
    weight, p = models.weight, models.weight.shape[-1]
    log_prior, x = models.share.log(), chunk.difference
    dtype = x.dtype
    # 1. Pairs in latent space, once for all divisions; pairs of a model's fold are not there.
    offset = torch.einsum("cnp,tp->tcn", x, weight)
    design = torch.einsum("cnp,tdp->tcnd", x, models.bilinear)
    there = chunk.sides.mask & outside(chunk.fold, models.fold.view(-1, 1, 1))
    centre, width = models.mean.unsqueeze(1), models.variance.unsqueeze(1)

    def infer(known: Tensor) -> tuple[Laplace, Tensor]:
        weight = (there & known).to(dtype)
        # groups are narrow: in training, points
        found = (
            laplace(offset, design, weight, centre, width, steps) if m == 1
            else at_centres(offset, design, weight, centre)
        )  # fmt: skip
        return found, torch.log_softmax(log_prior.unsqueeze(1) + found.evidence, -1)

    # 2. Gradients of the targets of each division.
    shape = (len(weight), x.shape[0])
    gradient_w, gradient_b = torch.zeros(*shape, p), torch.zeros(*shape, d, p)
    targets, loss = torch.zeros(shape), torch.zeros(shape)
    for context, target, noise in zip(*dealt):
        found, log_share = infer(context)
        slope = _slope(found, log_share, offset, design, noise, samples)
        scored = (there & target).to(dtype)
        gradient_w += torch.einsum("tcn,cnp->tcp", slope.offset * scored, x)
        gradient_b += (slope.design * scored.unsqueeze(-1)).mT @ x
        targets += scored.sum(-1)
        loss += (slope.loss * scored).sum(-1)
    # 3. What the population step reads: the posterior given all pairs.
    found, log_share = infer(chunk.sides.mask)
    share = log_share.exp()
    divergence = mixture_divergence(found, share, log_prior.unsqueeze(1), centre, width)
    known = there.any(-1).to(dtype)
    share = share * known.unsqueeze(-1)
    return Slopes(
        gradient_w, gradient_b, targets, loss, share, share.unsqueeze(-1) * found.mode,
        divergence * known, known,
    )  # fmt: skip


def per_target(found: Slopes) -> Slopes:
    """The same with every client counting alike, whatever the number of its pairs."""
    count = found.targets.clamp_min(1.0)
    return found._replace(
        weight=found.weight / count[..., None], bilinear=found.bilinear / count[..., None, None],
        loss=found.loss / count, targets=(found.targets > 0).to(found.targets.dtype),
    )  # fmt: skip


def _slope(
    found: Laplace, log_share: Tensor, offset: Tensor, design: Tensor, noise: Tensor, samples: int
) -> Slope:
    """Of the closed-form prediction, or of sampled latents: component by Gumbel-Softmax, z by
    reparameterisation."""
    if not samples:
        prediction = predicted(offset, design, found)
        return predictive_slope(found, log_share.exp(), prediction, design)
    m, d = found.mode.shape[-2:]
    uniform = torch.special.ndtr(noise[:, :, 1, :m]).unsqueeze(1)
    drawn = gumbel_softmax_log_weight(log_share, gumbel_noise(uniform), 1.0).exp()
    if not found.covariance.dim():  # points
        return sampled_slope((drawn.unsqueeze(-1) * found.mode).sum(-2), offset, design)
    factor = torch.linalg.cholesky(found.covariance)
    each = found.mode + (factor @ noise[:, None, :, None, 0, :d, None]).squeeze(-1)
    return sampled_slope((drawn.unsqueeze(-1) * each).sum(-2), offset, design)


@torch.no_grad()
def judged_of(
    models: Models, width: Width, chunk: Chunk
) -> tuple[Float[Tensor, "c"], Float[Tensor, "c"], Float[Tensor, "c"]]:
    """Sums over each client's targets of the models' own folds, given its other pairs:
    log-probability, how many are right, and how many there are."""
    m, x = models.shape[0], chunk.difference
    offset = torch.einsum("cnp,tp->tcn", x, models.weight)
    design = width.effect * torch.einsum("cnp,tdp->tcnd", x, models.bilinear)
    mine = chunk.fold == models.fold.view(-1, 1, 1)
    there = chunk.sides.mask & outside(chunk.fold, models.fold.view(-1, 1, 1))
    centre, known = models.mean.unsqueeze(1), there.to(x.dtype)
    spread = models.variance.unsqueeze(1) * (width.spread**2 if m > 1 else 1.0)
    found = (
        at_centres(offset, design, known, centre) if m > 1 and not width.spread
        else laplace(offset, design, known, centre, spread)
    )  # fmt: skip
    log_share = torch.log_softmax(models.share.unsqueeze(1).log() + found.evidence, -1)
    margin = mixed_log_odds(log_share, predicted(offset, design, found).log_odds)
    scored = (chunk.sides.mask & mine).to(x.dtype)
    right = (margin > 0).to(x.dtype) + 0.5 * (margin == 0).to(x.dtype)
    return (
        (logsigmoid(margin) * scored).sum((0, 2)),
        (right * scored).sum((0, 2)),
        scored.sum((0, 2)),
    )
