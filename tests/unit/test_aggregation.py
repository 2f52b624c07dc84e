"""Aggregators: what they are without attackers, and what attackers can do to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import trim_mean

from fedvpa.features.whitening import Whitener, WhiteningSums
from fedvpa.federated.aggregators import (
    Krum,
    Median,
    RobustMean,
    Total,
    TrimmedMean,
    WeightedMean,
    nearest_to_others,
)
from fedvpa.federated.components import (
    Moments,
    assignments,
    fit,
    moments,
    population,
    summed_moments,
)
from fedvpa.federated.random import stream
from fedvpa.federated.robust import from_each, robust_moments, robust_whitening

START = {"a": torch.zeros(3, 2), "b": torch.zeros(4)}


def updates(clients: int, attackers: int = 0, size: float = 100.0) -> dict[str, torch.Tensor]:
    generator = stream(0, "updates")
    out = {
        n: 1.0 + 0.1 * torch.randn(clients, *v.shape, generator=generator) for n, v in START.items()
    }
    for value in out.values():
        value[:attackers] = -size
    return out


def test_trimmed_mean_and_median_are_those_of_the_textbook() -> None:
    trained = updates(11)
    for robust, reference in (
        (TrimmedMean(0.2), lambda x: trim_mean(x, 0.2, axis=0)),
        (Median(), lambda x: np.median(x, axis=0)),
    ):
        total = Total()
        for part in torch.arange(11).split(4):  # in chunks, as they arrive
            chunk = {n: v[part] for n, v in trained.items()}
            total = robust.add(total, START, chunk, torch.ones(len(part)))
        for name, value in robust.result(total).items():
            np.testing.assert_allclose(value.numpy(), reference(trained[name].numpy()), rtol=1e-5)


@pytest.mark.parametrize("robust", [TrimmedMean(0.2), Median(), Krum(0.2)])
def test_a_share_of_attackers_does_not_carry_the_mean_away(robust: RobustMean) -> None:
    trained, weight = updates(20, attackers=4), torch.ones(20)
    plain = WeightedMean()
    assert plain.result(plain.add(Total(), START, trained, weight))["b"].mean() < -15
    for value in robust.result(robust.add(Total(), START, trained, weight)).values():
        torch.testing.assert_close(value, torch.ones_like(value), atol=0.15, rtol=0)


def test_norm_bounding_limits_one_client() -> None:
    trained = updates(10, attackers=1, size=1e4)
    mean = WeightedMean(max_norm=3.0)
    total = mean.add(Total(), START, trained, torch.ones(10))
    for value in mean.result(total).values():
        # 9 x 0.95 - 0.95, over 10
        torch.testing.assert_close(value, 0.76 * torch.ones_like(value), atol=0.1, rtol=0)


def test_krum_keeps_those_near_each_other_and_few_clients_are_all_kept() -> None:
    points = torch.cat([torch.randn(8, 3, generator=stream(1, "k")) * 0.1, torch.full((2, 3), 5.0)])
    assert nearest_to_others(points, 2).tolist() == list(range(8))
    assert nearest_to_others(points[:3], 1).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="no client"):
        Median().result(Total())


@pytest.mark.parametrize("robust", [TrimmedMean(0.2), Median(), Krum(0.2)])
def test_whitening_withstands_a_share_of_attackers(robust: RobustMean) -> None:
    generator = stream(0, "whitening")
    scale = torch.linspace(2.0, 0.2, 12)
    each = [
        WhiteningSums.of(torch.randn(30, 2, 12, generator=generator) * scale) for _ in range(20)
    ]
    honest = Whitener.from_sums(WhiteningSums(*(torch.stack(x).sum(0) for x in zip(*each))), 4)
    # within what is plausible of one client: twenty times the others, in a direction of no use
    useless = torch.zeros(12, 12, dtype=torch.float64)
    useless[-1, -1] = 20 * float(each[0].moment.trace())
    attacked = [sums._replace(moment=useless) if i < 4 else sums for i, sums in enumerate(each)]
    plain = Whitener.from_sums(WhiteningSums(*(torch.stack(x).sum(0) for x in zip(*attacked))), 4)
    assert plain.projection[-1].abs().max() > 10 * plain.projection[0].abs().min()
    found = Whitener.from_sums(robust_whitening(attacked, robust), 4)

    def spanned(whitener: Whitener) -> torch.Tensor:
        return torch.linalg.qr(whitener.projection)[0]

    overlap = torch.linalg.svdvals(spanned(found).T @ spanned(honest))
    assert overlap.min() > 0.8
    assert torch.linalg.svdvals(spanned(plain).T @ spanned(honest)).min() < 0.5


@pytest.mark.parametrize("robust", [TrimmedMean(0.2), Median(), Krum(0.2)])
def test_components_withstand_a_share_of_attackers(robust: RobustMean) -> None:
    generator = stream(0, "latents")
    mean = torch.cat([torch.randn(20, 3, generator=generator) * 0.2 + side for side in (-2.0, 2.0)])
    variance = torch.full_like(mean, 0.1)
    centre = torch.stack([mean[:20].mean(0), mean[20:].mean(0)]).unsqueeze(0)
    mean[[0, 1, 20, 21]] = torch.tensor([[-15.0] * 3, [-15.0] * 3, [15.0] * 3, [15.0] * 3])
    share = assignments(mean, centre)
    plain = population(_first(summed_moments(mean, variance, centre)))
    found = population(_first(robust_moments(share, mean, variance, centre, robust)))
    truth = torch.tensor([[-2.0] * 3, [2.0] * 3])
    assert (plain.mean - truth).abs().max() > 1
    torch.testing.assert_close(found.mean, truth, atol=0.2, rtol=0)
    assert plain.variance.min() > 10 * found.variance.max()
    # from what each client tells, it is the same; as many as are taken for attackers are left out
    again = robust_moments(*from_each([moments(share, mean, variance)]), centre, robust)
    torch.testing.assert_close(again, robust_moments(share, mean, variance, centre, robust))
    assert again.weight.sum() == 40 - 8


@pytest.mark.parametrize("robust", [TrimmedMean(0.2), Median(), Krum(0.2)])
def test_attackers_that_stand_together_get_no_component_of_their_own(robust: RobustMean) -> None:
    generator = stream(0, "latents")
    mean = torch.cat([torch.randn(20, 3, generator=generator) * 0.2 + side for side in (-2.0, 2.0)])
    mean[[0, 1, 2, 3, 20, 21, 22, 23]] = torch.tensor([0.0, 17.0, 0.0])
    variance = torch.full_like(mean, 0.1)

    def ask(centre: torch.Tensor) -> Moments:
        return robust_moments(assignments(mean, centre), mean, variance, centre, robust)

    centres = fit(ask, 3, [2], seed=0)[2]
    found = (centres.total / centres.weight.unsqueeze(-1)).sort(0).values
    torch.testing.assert_close(found, torch.tensor([[-2.0] * 3, [2.0] * 3]), atol=0.3, rtol=0)
    plain = fit(lambda c: summed_moments(mean, variance, c), 3, [2], seed=0)[2]
    assert (plain.total / plain.weight.unsqueeze(-1)).abs().max() > 10


def _first(found):  # type: ignore[no-untyped-def]
    return type(found)(*(value[0] for value in found))
