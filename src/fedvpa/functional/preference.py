"""The Bradley-Terry-Luce likelihood of choices, and how well predicted choices are calibrated
(M2)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedvpa.functional.segments import summed_last


def choice_log_likelihood(
    margin: Float[Tensor, "*b n"], weight: Float[Tensor, "*#b n"]
) -> Float[Tensor, "*b"]:
    """Sum over pairs of weight x log sigmoid(r(chosen) - r(rejected)), in nats (M2; Bradley &
    Terry, 1952)."""
    return (logsigmoid(margin) * weight).sum(-1)


def mean_choice_loss(
    margin: Float[Tensor, "*b n"], weight: Float[Tensor, "*#b n"],
    owner: Int[Tensor, "b"] | None = None,
) -> Float[Tensor, "*c"]:  # fmt: skip
    """Negative log-likelihood per pair; 0 where no pair has weight. With an `owner` of every row,
    one number per owner."""
    total = summed_last(choice_log_likelihood(margin, weight), owner)
    return -total / summed_last(weight.sum(-1), owner).clamp_min(1)


def predictive_margin(
    share: Float[Tensor, "*b m"], margin: Float[Tensor, "*b n m"]
) -> Float[Tensor, "*b n"]:
    """Log-odds of the choice under a mixture: logit of sum_m share_m sigmoid(margin_m), the
    posterior predictive.

    Averaging probabilities instead of rewards keeps predictions as uncertain as the posterior over
    the components is.
    """
    weight = share.log().unsqueeze(-2)
    return torch.logsumexp(weight + logsigmoid(margin), -1) - torch.logsumexp(
        weight + logsigmoid(-margin), -1
    )


def expected_calibration_error(probability: Float[Tensor, "n"], bins: int = 10) -> float:
    """Gap between confidence and accuracy, averaged over equally wide bins of confidence (Guo et
    al., 2017, eq. 3).

    `probability` is that of the choice which was made; the predicted choice is right where it
    exceeds 1/2, and a tie is half right.
    """
    confidence = torch.maximum(probability, 1 - probability)
    correct = (probability > 0.5).to(probability.dtype) + 0.5 * (probability == 0.5).to(
        probability.dtype
    )
    index = ((confidence - 0.5) * 2 * bins).long().clamp_(0, bins - 1)
    gap = torch.zeros(bins, dtype=probability.dtype).index_add_(0, index, correct - confidence)
    return float(gap.abs().sum() / max(1, probability.numel()))
