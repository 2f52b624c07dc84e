"""Tensor functions against torch.distributions and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from fedvpa.functional.gaussian import (
    bounded_log_var,
    gaussian_kl,
    gaussian_log_prob,
    product_of_experts,
    standard_kl_per_dimension,
)
from fedvpa.functional.mixture import (
    gumbel_noise,
    gumbel_softmax_log_weight,
    mixture_kl_bound,
    mixture_prior_kl,
)
from fedvpa.functional.preference import expected_calibration_error, mean_choice_loss
from fedvpa.functional.prototypes import orthogonal_prototypes, orthonormality_loss, pull_loss
from fedvpa.functional.whitening import second_moment, whitening_matrix


@pytest.fixture
def g() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def normal(mean: torch.Tensor, log_var: torch.Tensor) -> Independent:
    return Independent(Normal(mean, (0.5 * log_var).exp()), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_density_and_divergence_agree_with_torch(
    g: torch.Generator, dtype: torch.dtype
) -> None:
    mean, log_var, other, other_log_var, x = (
        torch.randn(5, 4, generator=g).to(dtype) for _ in range(5)
    )
    torch.testing.assert_close(
        gaussian_log_prob(x, mean, log_var), normal(mean, log_var).log_prob(x)
    )
    torch.testing.assert_close(
        gaussian_kl(mean, log_var, other, other_log_var),
        kl_divergence(normal(mean, log_var), normal(other, other_log_var)),
    )
    zero = torch.zeros_like(mean)
    torch.testing.assert_close(
        standard_kl_per_dimension(mean, log_var).sum(-1), gaussian_kl(mean, log_var, zero, zero)
    )


def test_bounded_log_var_keeps_its_gradient_far_out() -> None:
    raw = torch.tensor([-40.0, 0.0, 40.0], requires_grad=True)
    out = bounded_log_var(raw)
    assert out.abs().max() <= 8
    out.sum().backward()
    assert raw.grad is not None
    assert (raw.grad > 0).all()


def test_product_of_experts_adds_precisions_and_is_standard_when_empty(g: torch.Generator) -> None:
    mean, log_var = torch.randn(3, 2, generator=g), torch.randn(3, 2, generator=g)
    m, lv = product_of_experts(mean, log_var, torch.tensor([1.0, 1.0, 0.0]))
    precision = 1 + (-log_var[:2]).exp().sum(0)
    torch.testing.assert_close(lv, -precision.log())
    torch.testing.assert_close(m, ((-log_var[:2]).exp() * mean[:2]).sum(0) / precision)
    m, lv = product_of_experts(mean, log_var, torch.zeros(3))
    assert torch.equal(m, torch.zeros(2))
    assert torch.equal(lv, torch.zeros(2))


def test_mixture_kl_equals_torch_on_the_same_samples(g: torch.Generator) -> None:
    mean, log_var = torch.randn(6, 3, generator=g), torch.randn(6, 3, generator=g)
    peers, peer_log_var = torch.randn(4, 3, generator=g), torch.randn(4, 3, generator=g)
    log_weight = torch.log_softmax(torch.randn(6, 4, generator=g), -1)
    noise = torch.randn(50, 6, 3, generator=g)
    z = mean + (0.5 * log_var).exp() * noise
    expected = []
    for i in range(6):
        mixture = MixtureSameFamily(Categorical(logits=log_weight[i]), normal(peers, peer_log_var))
        expected.append(
            (normal(mean[i], log_var[i]).log_prob(z[:, i]) - mixture.log_prob(z[:, i])).mean()
        )
    torch.testing.assert_close(
        mixture_prior_kl(mean, log_var, peers, peer_log_var, log_weight, noise),
        torch.stack(expected),
    )


def test_mixture_with_one_component_is_the_gaussian_kl(g: torch.Generator) -> None:
    mean, log_var = torch.randn(2, 3, generator=g), torch.randn(2, 3, generator=g)
    zero, weight = torch.zeros(1, 3), torch.zeros(2, 1)
    exact = standard_kl_per_dimension(mean, log_var).sum(-1)
    torch.testing.assert_close(mixture_kl_bound(mean, log_var, zero, zero, weight), exact)
    estimate = mixture_prior_kl(
        mean, log_var, zero, zero, weight, torch.randn(200_000, 2, 3, generator=g)
    )
    torch.testing.assert_close(estimate, exact, atol=0.02, rtol=0)


def test_mixture_of_copies_of_q_costs_nothing_and_the_bound_is_above(g: torch.Generator) -> None:
    mean, log_var = torch.randn(1, 3, generator=g), torch.randn(1, 3, generator=g)
    copies = mean.expand(5, 3), log_var.expand(5, 3)
    log_weight = torch.log_softmax(torch.randn(1, 5, generator=g), -1)
    noise = torch.randn(20_000, 1, 3, generator=g)
    assert mixture_prior_kl(mean, log_var, *copies, log_weight, noise).abs() < 1e-5
    peers, peer_log_var = torch.randn(5, 3, generator=g), torch.zeros(5, 3)
    estimate = mixture_prior_kl(mean, log_var, peers, peer_log_var, log_weight, noise)
    bound = mixture_kl_bound(mean, log_var, peers, peer_log_var, log_weight)
    convex = (
        log_weight.exp()
        * gaussian_kl(mean.unsqueeze(-2), log_var.unsqueeze(-2), peers, peer_log_var)
    ).sum(-1)
    assert estimate - 0.05 < bound < convex


def test_gumbel_softmax_leaves_minus_infinity_out_and_samples_the_softmax(
    g: torch.Generator,
) -> None:
    logit = torch.tensor([0.0, 1.0, -torch.inf])
    gumbel = gumbel_noise(torch.rand(20_000, 3, generator=g))
    weight = gumbel_softmax_log_weight(logit, gumbel, 1.0).exp()
    assert torch.equal(weight[:, 2], torch.zeros(20_000))
    chosen = torch.bincount(weight.argmax(-1), minlength=3) / 20_000  # the Gumbel-max trick
    torch.testing.assert_close(chosen, torch.softmax(logit, -1), atol=0.02, rtol=0)
    assert torch.isfinite(gumbel_noise(torch.tensor([0.0, 1.0]))).all()


def test_prototypes_are_orthogonal_at_their_radius_and_cost_nothing(g: torch.Generator) -> None:
    p = orthogonal_prototypes(4, 9, 5.0, g)
    torch.testing.assert_close(p @ p.T, 25 * torch.eye(4), atol=1e-4, rtol=0)
    assert orthonormality_loss(p, 5.0) < 1e-9
    assert orthonormality_loss(2 * p, 5.0) == pytest.approx(4 * 9, rel=1e-4)
    label = torch.tensor([2, -1])
    torch.testing.assert_close(pull_loss(torch.zeros(2, 9), p, label), torch.tensor([25.0, 0.0]))
    with pytest.raises(ValueError, match="do not fit"):
        orthogonal_prototypes(10, 9, 5.0, g)


def test_whitened_differences_have_unit_second_moment_whatever_the_labels(
    g: torch.Generator,
) -> None:
    x = torch.randn(500, 10, generator=g) @ torch.randn(10, 10, generator=g)
    w = whitening_matrix(second_moment(x), 500, 6)
    y = x @ w
    torch.testing.assert_close(y.T @ y / 500, torch.eye(6), atol=1e-3, rtol=0)
    flipped = x * torch.where(torch.rand(500, 1, generator=g) < 0.5, 1.0, -1.0)
    torch.testing.assert_close(whitening_matrix(second_moment(flipped), 500, 6), w)
    low_rank = torch.randn(50, 2, generator=g) @ torch.randn(2, 10, generator=g)
    assert torch.equal(whitening_matrix(second_moment(low_rank), 50, 6)[:, 2:], torch.zeros(10, 4))


def test_choice_loss_at_no_preference_is_log_two_and_empty_costs_nothing() -> None:
    weight = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(
        mean_choice_loss(torch.zeros(2, 3), weight), torch.tensor([math.log(2), 0.0])
    )
    assert torch.isfinite(mean_choice_loss(torch.full((1, 3), -1e4), torch.ones(1, 3))).all()


def test_calibration_error_of_certain_and_wrong_is_one() -> None:
    assert expected_calibration_error(torch.tensor([1.0, 1.0])) == pytest.approx(0)
    assert expected_calibration_error(torch.tensor([0.0, 0.0])) == pytest.approx(1)
    assert expected_calibration_error(torch.full((4,), 0.5)) == pytest.approx(0)
    p = torch.tensor([0.75] * 3 + [0.25])
    assert expected_calibration_error(p) == pytest.approx(0, abs=1e-6)
