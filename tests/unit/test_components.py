"""Components fitted from sums: the same as from everybody's latents, and nothing but sums is asked
for."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans

from fedvpa.federated.components import (
    Moments,
    adjusted_price,
    assignments,
    best_separated,
    fit,
    mixture,
    moments,
    population,
    summed_moments,
)
from fedvpa.federated.population import fit_population
from fedvpa.federated.random import stream


def groups(
    count: int, each: int, latent: int = 5, spread: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = stream(0, "groups", count)
    centre = 2.5 * torch.randn(count, latent, generator=generator)
    mean = centre.repeat_interleave(each, 0) + spread * torch.randn(
        count * each, latent, generator=generator
    )
    return mean, torch.rand(count * each, latent, generator=generator) + 0.1


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_fit_from_sums_equals_k_means_on_the_latents(count: int) -> None:
    mean, variance = groups(count, 12)
    found = fit(lambda centre: summed_moments(mean, variance, centre), 5, [count], 0)[count]
    ours, theirs = population(found), fit_population(mean, count, 0)
    order = ours.mean.sum(1).argsort()
    other = theirs.mean.sum(1).argsort()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a[order], b[other], atol=1e-4, rtol=1e-3)
    inertia = KMeans(count, n_init=20, random_state=0).fit(mean.numpy()).inertia_
    assert sum(
        found.squared.sum(1) - (found.total.square() / found.weight.unsqueeze(-1)).sum(1)
    ) == pytest.approx(inertia, rel=1e-3)


def test_only_the_sum_over_clients_matters() -> None:
    mean, variance = groups(3, 8)
    centre = torch.randn(4, 3, 5, generator=stream(1, "c"))
    whole = summed_moments(mean, variance, centre)
    each = moments(assignments(mean, centre), mean, variance)
    for a, b in zip(whole, each):
        torch.testing.assert_close(a, b.sum(0))
    parts = summed_moments(mean[:10], variance[:10], centre).plus(
        summed_moments(mean[10:], variance[10:], centre)
    )
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b)


def test_the_prior_has_the_spread_of_means_and_of_posteriors() -> None:
    mean, variance = groups(1, 400)
    found = Moments(*(v[0] for v in summed_moments(mean, variance, torch.zeros(1, 1, 5))))
    prior = mixture(found)
    torch.testing.assert_close(prior.mean[0], mean.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        prior.log_var[0].exp(), mean.var(0, unbiased=False) + variance.mean(0), atol=1e-3, rtol=1e-3
    )
    assert prior.client.tolist() == [-1]


def test_a_component_of_noise_is_not_kept() -> None:
    """With noise on every sum, all components found hold clients, at the groups' places."""
    mean, variance = groups(2, 400)
    generator = stream(3, "noise")

    def noisy(centre: torch.Tensor) -> Moments:
        found = summed_moments(mean, variance, centre)
        noised = [v + 20 * torch.randn(v.shape, generator=generator) for v in found]
        return Moments(
            noised[0].clamp_min(0), noised[1], noised[2].clamp_min(0), noised[3].clamp_min(0)
        )

    for seed in range(8):
        found = population(fit(noisy, 5, [2], seed, restarts=2, iterations=3, least=60.0)[2])
        assert found.weight.min() > 0.4
        nearest = (
            torch.cdist(found.mean, torch.stack([mean[:400].mean(0), mean[400:].mean(0)]))
            .min(1)
            .values
        )
        assert nearest.max() < 0.6


def test_number_of_components_from_sums() -> None:
    for count in (2, 3, 5):
        mean, variance = groups(count, 15)
        fits = fit(lambda c, m=mean, v=variance: summed_moments(m, v, c), 5, range(2, 8), 0)
        assert best_separated(fits) == count
    assert best_separated({1: fits[2]}) == 1


def test_prices_balance_the_labels() -> None:
    """Three quarters of the clients sit at one component; prices bring the shares to a half
    each, and stay there."""
    generator = stream(2, "prices")
    mean = torch.cat(
        [
            torch.randn(90, 2, generator=generator) + 1.0,
            torch.randn(30, 2, generator=generator) - 1.0,
        ]
    )
    centre = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    found = moments(assignments(mean, centre), mean, torch.ones_like(mean))
    total = Moments(*(v.sum(0) for v in found))
    price, before = torch.zeros(2), assignments(mean, centre).sum(0)
    for _ in range(30):
        price = adjusted_price(price, assignments(mean, centre, price).sum(0), total)
    after = assignments(mean, centre, price).sum(0)
    assert (before - 60).abs().max() > 20
    assert (after - 60).abs().max() <= 6
