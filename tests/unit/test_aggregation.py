"""Aggregators: what they are without attackers, and what attackers can do to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import trim_mean

from fedvpa.federated.aggregators import (
    Krum,
    Median,
    RobustMean,
    Total,
    TrimmedMean,
    WeightedMean,
    nearest_to_others,
)
from fedvpa.federated.random import stream

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
