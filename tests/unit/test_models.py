"""Encoder and rewards: symmetries, padding, and stacks of clients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fedvpa.config import build_config
from fedvpa.selector.encoder import Encoder
from fedvpa.selector.heads import Head, build_head
from fedvpa.selector.heads.bilinear import BilinearHead
from fedvpa.selector.reward import SharedReward
from fedvpa.selector.selector import Selector, refined_posterior
from fedvpa.types import PairBatch, Population
from tests.conftest import synthetic_store

POOLINGS = ["mean", "attention", "poe"]
CONDITIONINGS = ["bilinear", "concat", "film", "additive"]


def head(conditioning: str) -> Head:
    given = {"inputs": 8, "latent": 4, "conditioning": conditioning}
    given |= {"reward_hidden": 6} if conditioning in ("concat", "film") else {}
    return build_head(config=build_config({"method": "fedvpl", "model": given}))


def seeded(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def jittered(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    g = seeded(9)
    return {k: v + 0.3 * torch.randn(v.shape, generator=g) for k, v in params.items()}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("odd", [True, False])
def test_posterior_ignores_padding_order_and_neighbours(pooling: str, odd: bool) -> None:
    encoder = Encoder(8, 4, (16,), pooling, odd)
    params = jittered(encoder.init(seeded()))
    x = torch.randn(5, 8, generator=seeded(1))
    alone = encoder(params, x, torch.ones(5, dtype=torch.bool))
    junk = torch.cat([torch.full((3, 8), 7.0), x.flip(0)])
    mask = torch.tensor([False] * 3 + [True] * 5)
    padded = encoder(params, torch.stack([junk, junk * 2]), torch.stack([mask, mask]))
    torch.testing.assert_close(padded.mean[0], alone.mean)
    torch.testing.assert_close(padded.log_var[0], alone.log_var)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_odd_encoder_reverses_the_mean_and_keeps_sigma(pooling: str) -> None:
    encoder = Encoder(8, 4, (16, 12), pooling, odd=True)
    params = jittered(encoder.init(seeded()))
    x, mask = torch.randn(5, 8, generator=seeded(1)), torch.ones(5, dtype=torch.bool)
    there, back = encoder(params, x, mask), encoder(params, -x, mask)
    torch.testing.assert_close(back.mean, -there.mean)
    torch.testing.assert_close(back.log_var, there.log_var)


def test_product_of_experts_grows_surer_with_every_pair() -> None:
    encoder = Encoder(8, 4, (16,), "poe")
    params = encoder.init(seeded())
    x = torch.randn(6, 8, generator=seeded(1))
    widths = [
        encoder(params, x, torch.arange(6) < n).log_var.sum().item() for n in range(7)
    ]  # fmt: skip
    assert widths[0] == 0
    assert all(b < a for a, b in pairwise(widths))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_margin_is_antisymmetric_in_the_two_responses(conditioning: str) -> None:
    reward = head(conditioning)
    params = jittered(reward.init(seeded()))
    batch, z = synthetic_store().batch([0, 1]), torch.randn(2, 4, generator=seeded(2))
    swapped = batch._replace(difference=-batch.difference, order=-batch.order)
    torch.testing.assert_close(reward.margin(params, z, swapped), -reward.margin(params, z, batch))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_z_changes_margins_and_stacked_clients_equal_single_ones(conditioning: str) -> None:
    reward = head(conditioning)
    each = [jittered(reward.init(seeded(s))) for s in range(3)]
    batch, z = synthetic_store().batch([0, 1, 2]), torch.randn(3, 4, generator=seeded(2))
    together = reward.margin({k: torch.stack([p[k] for p in each]) for k in each[0]}, z, batch)
    for c in range(3):
        one = PairBatch(*(None if v is None else v[c] for v in batch))
        torch.testing.assert_close(reward.margin(each[c], z[c], one), together[c])
    assert (
        reward.margin(each[0], z + 1, batch) - reward.margin(each[0], z, batch)
    ).abs().max() > 1e-3
    samples = reward.margin(each[0], torch.stack([z, z + 1]), batch)
    torch.testing.assert_close(samples[1], reward.margin(each[0], z + 1, batch))


def test_additive_reward_cannot_tell_pairs_apart_by_z() -> None:
    """The paper's form: z adds one number to every margin, up to the order in which the
    responses were shown."""
    reward = head("additive")
    params = jittered(reward.init(seeded()))
    batch = synthetic_store(ragged=False).batch([0])
    z, other = torch.randn(2, 1, 4, generator=seeded(2))
    effect = (reward.margin(params, z, batch) - reward.margin(params, other, batch)) * batch.order
    torch.testing.assert_close(effect, effect[:, :1].expand_as(effect))


def test_low_rank_bilinear_has_that_rank() -> None:
    reward = BilinearHead(8, 6, rank=2)
    params = reward.init(seeded())
    directions = reward.direction(params, torch.eye(6)) - params["reward.weight"]
    assert torch.linalg.matrix_rank(directions) == 2


def test_shared_mlp_reads_the_features_and_says_so_when_they_are_missing() -> None:
    reward = SharedReward(8, hidden=5)
    batch = synthetic_store().batch([0])
    assert reward.margin(reward.init(seeded()), batch).shape == batch.mask.shape
    with pytest.raises(ValueError, match="only their difference"):
        reward.margin(reward.init(seeded()), batch._replace(common=None))


def test_responsibilities_are_bayes_rule_on_the_choices() -> None:
    reward = BilinearHead(8, 4)
    selector = Selector(Encoder(8, 4), reward, latent_evidence=0.3)
    params = jittered(selector.init(seeded()))
    population = Population(
        torch.randn(3, 4, generator=seeded(4)), torch.ones(3), torch.tensor([0.2, 0.3, 0.5])
    )
    batch = synthetic_store(ragged=False).batch([0])
    none = torch.zeros_like(batch.mask)
    torch.testing.assert_close(
        selector.responsibilities(params, population, batch, none), population.weight.unsqueeze(0)
    )
    likelihood = torch.stack(
        [
            torch.sigmoid(reward.margin(params, c.unsqueeze(0), batch)).prod()
            for c in population.mean
        ]
    )
    mean = selector.posterior(params, batch, batch.mask).mean
    density = (-0.5 * (mean - population.mean).square().sum(-1)).exp()
    expected = likelihood * population.weight * density**0.3
    torch.testing.assert_close(
        selector.responsibilities(params, population, batch, batch.mask)[0],
        expected / expected.sum(),
    )
    refined = refined_posterior(torch.tensor([[0.0, 1.0, 0.0]]), population)
    torch.testing.assert_close(refined.mean[0], population.mean[1])
    torch.testing.assert_close(refined.log_var.exp()[0], torch.ones(4), atol=1e-5, rtol=0)
