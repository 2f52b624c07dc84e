"""Differential privacy: bounds hold, noise is what it should be, and epsilon is that of the
published accountant."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedvpa.config import build_config
from fedvpa.errors import BadInputError
from fedvpa.experiment.build import build_method
from fedvpa.federated.accounting import BudgetError, Privacy, noise_for, privacy_of
from fedvpa.federated.aggregators import Total, WeightedMean, bounded
from fedvpa.federated.algorithm import poisson_cohort
from fedvpa.federated.components import Moments
from fedvpa.federated.local import silenced
from fedvpa.federated.random import stream
from fedvpa.federated.release import (
    PrivateRelease,
    Sums,
    clipped_latent,
    noised_moments,
    secret_normal,
    seeded_noise,
    seeded_normal,
)
from fedvpa.types import Posterior
from tests.conftest import synthetic_store

pytest.importorskip("dp_accounting")
PRIVACY = Privacy(rate=0.1, clients=1000)


def test_one_client_moves_a_sum_by_its_bound_at_the_most() -> None:
    generator = stream(0, "bound")
    start = {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}
    trained = {
        n: v + 10 ** torch.arange(-3.0, 3.0).view(-1, *[1] * v.dim()) for n, v in start.items()
    }
    kept = bounded(start, trained, PRIVACY.clip)
    norms = sum((kept[n] - start[n]).flatten(1).square().sum(1) for n in start).sqrt()
    assert norms.max() <= PRIVACY.clip * (1 + 1e-5)
    torch.testing.assert_close(kept["a"][0], trained["a"][0])  # a short update is left alone
    moved, shortened = (trained["a"] - start["a"]).flatten(1), (kept["a"] - start["a"]).flatten(1)
    direction = torch.nn.functional.cosine_similarity(moved, shortened)
    torch.testing.assert_close(direction, torch.ones(6))
    mean, variance = clipped_latent(
        PRIVACY, 100 * torch.randn(5, 16, generator=generator), torch.full((5, 16), 9.0)
    )
    assert mean.norm(dim=1).max() <= PRIVACY.latent_clip * (1 + 1e-5)
    assert mean.square().norm(dim=1).max() <= PRIVACY.latent_clip**2 * (1 + 1e-5)
    assert variance.norm(dim=1).max() <= PRIVACY.variance_clip * (1 + 1e-5)


def test_noise_has_the_deviation_that_is_accounted_for() -> None:
    zero = {"a": torch.zeros(200, 200)}
    release = PrivateRelease(PRIVACY, seeded_noise(0))
    update, _ = release.update(WeightedMean(), Total(), zero, Sums(), 0)
    noised = update["a"] * PRIVACY.expected
    assert noised.std() == pytest.approx(PRIVACY.noise * PRIVACY.clip, rel=0.02)
    # of so many clients that no projection applies
    clients = torch.full((100,), 1e6)
    full = Moments(clients, *(torch.full((100, 50), v * 1e6) for v in (0.1, 2.0, 0.5)))
    found = noised_moments(PRIVACY, full, PRIVACY.fit_noise, seeded_normal(stream(0, "m")))
    for value, before, bound in zip(found, full, (1, 2, 4, 4)):
        assert (value - before).std() == pytest.approx(
            PRIVACY.fit_noise * bound, rel=0.2 if value.dim() == 1 else 0.03
        )


def test_noised_moments_are_those_that_clipped_latents_can_have() -> None:
    few = Moments(torch.full((50,), 2.0), *(torch.zeros(50, 8) for _ in range(3)))
    weight, total, squared, variance = noised_moments(
        PRIVACY, few, 4.0, seeded_normal(stream(0, "m"))
    )
    count = weight.clamp_min(1e-6).unsqueeze(-1)
    assert (weight >= 0).all()
    assert ((total / count).norm(dim=-1) <= PRIVACY.latent_clip * (1 + 1e-5)).all()
    assert ((variance / count) <= PRIVACY.variance_clip * (1 + 1e-5)).all()
    floor = (4.0 * PRIVACY.latent_clip / count.clamp_min(1.0)).square()
    spread = squared / count - (total / count).square()
    kept = weight > 0
    assert (spread[kept] >= floor[kept] * (1 - 1e-3)).all()


def test_a_private_client_without_finite_numbers_stops_nothing() -> None:
    start = {"w": torch.ones(3)}
    trained = {"w": torch.tensor([[2.0, 2, 2], [torch.nan, 2, 2], [2, 2, 2]])}
    posterior = Posterior(torch.ones(3, 2), torch.tensor([[1.0, 1], [1, 1], [torch.inf, 1]]))
    calm, quiet = silenced(start, trained, posterior, ["a", "b", "c"])
    assert torch.equal(calm["w"], torch.tensor([[2.0, 2, 2], [1, 1, 1], [1, 1, 1]]))
    assert torch.equal(quiet.mean, torch.tensor([[1.0, 1], [0, 0], [0, 0]]))
    assert quiet.log_var.isfinite().all()


def test_epsilon_is_that_of_the_gaussian_mechanism_and_grows() -> None:
    one = Privacy(rate=1.0, clients=10, noise=2.0)
    # the exact curve of one Gaussian mechanism (Balle & Wang, 2018, theorem 8)
    epsilon = one.epsilon(1, 0)

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    delta = phi(1 / (2 * 2.0) - epsilon * 2.0) - math.exp(epsilon) * phi(
        -1 / (2 * 2.0) - epsilon * 2.0
    )
    assert delta == pytest.approx(1e-5, rel=0.02)
    curve = [PRIVACY.epsilon(r, 1) for r in (1, 10, 50)]
    assert curve == sorted(curve)
    assert (
        PRIVACY.epsilon(50, 0) < PRIVACY.epsilon(50, 1) < replace(PRIVACY, rate=0.5).epsilon(50, 1)
    )
    assert replace(PRIVACY, moments_every_round=True).epsilon(10, 0) > PRIVACY.epsilon(10, 0)
    assert replace(PRIVACY, noise=0.0).epsilon(1, 0) == math.inf
    assert PRIVACY.epsilon(0, 0) == 0


def test_plan_gives_the_least_noise_within_the_target() -> None:
    noise = noise_for(PRIVACY, 30, 1, 6.0)
    assert (
        replace(PRIVACY, noise=noise).epsilon(30, 1)
        <= 6.0
        < replace(PRIVACY, noise=noise / 1.03).epsilon(30, 1)
    )
    with pytest.raises(BadInputError, match="the fits alone cost"):
        noise_for(replace(PRIVACY, fit_noise=1.0), 30, 1, 1.0)


def test_cohorts_are_independent_draws() -> None:
    sizes = torch.tensor(
        [len(poisson_cohort(stream(0, "cohort", r), 1000, 0.1)) for r in range(200)]
    ).double()
    assert sizes.mean() == pytest.approx(100, abs=3)
    assert sizes.var() == pytest.approx(90, rel=0.35)


def private_config(**privacy: float):
    return build_config(
        {
            "method": "fedvpl+anchors", "model": {"inputs": 8, "latent": 4, "encoder_hidden": (6,)},
            "data": {"public": "p", "clients": 40}, "prior": {"kind": "components"},
            "prototypes": {"modes": 2, "start_round": 2},
            "federation": {"rounds": 4, "cohort": 10, "local_steps": 3},
            "privacy": {"enabled": True, **privacy},
        }
    )  # fmt: skip


def test_a_private_run_reports_epsilon_and_stops_at_its_budget() -> None:
    config = private_config(noise=1.0, fit_noise=2.0)
    store = synthetic_store(clients=40)
    privacy = privacy_of(config, 40)
    assert privacy is not None
    algorithm, clients = build_method(config, store)
    state, seen = algorithm.init(store.roster), []
    for r in range(4):
        state, row = algorithm.apply(
            state, clients, poisson_cohort(stream(0, "cohort", r), 40, privacy.rate)
        )
        seen.append(row["epsilon"])
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(privacy.epsilon(4, 1))
    assert seen[0] == pytest.approx(privacy.epsilon(1, 1))  # the fit counts from the start
    assert state.population["mean"].shape == (2, 4)
    empty, _ = algorithm.apply(state, clients, [])  # nobody was drawn: noise alone
    assert empty.round == 5
    budget = (privacy.epsilon(2, 1) + privacy.epsilon(3, 1)) / 2
    short = private_config(noise=1.0, fit_noise=2.0, budget=budget)
    stopping, clients = build_method(short, store)
    state = stopping.init(store.roster)
    for _ in range(2):
        state, _ = stopping.apply(state, clients, range(10))
    with pytest.raises(BudgetError, match="is spent: round 3 would take it"):
        stopping.apply(state, clients, range(10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior": {"kind": "gaussian"}}, "prior.kind must be components"),
        ({"prototypes": {"modes": "auto"}}, "modes must be a number"),
        ({"data": {"public": None}}, "data.public must name"),
        ({"federation": {"aggregator": "median"}}, "aggregator must be mean"),
        ({"privacy": {"enabled": False, "noise": 2.0}}, "privacy.enabled is false"),
        ({"method": "fedavg-btl", "prior": {}, "prototypes": {}}, "."),
    ],
)
def test_what_privacy_does_not_go_with(change: dict, message: str) -> None:  # type: ignore[type-arg]
    given = {
        "method": "fedvpl+anchors", "data": {"public": "p"}, "prior": {"kind": "components"},
        "prototypes": {"modes": 2},
        "privacy": {"enabled": True},
    }  # fmt: skip
    build_config(given)
    with pytest.raises(BadInputError, match=message):
        build_config(given, change)


def test_noise_that_hides_every_component_is_refused() -> None:
    with pytest.raises(BadInputError, match=r"at most 6\.67 for 40 clients and 2 components"):
        privacy_of(private_config(fit_noise=40.0), 40)


def test_secret_noise_is_normal_and_is_not_drawn_twice() -> None:
    first, second = secret_normal(torch.Size([50001])), secret_normal(torch.Size([50001]))
    assert not torch.equal(first, second)
    both = torch.cat([first, second]).double().sort().values
    ideal = torch.distributions.Normal(0.0, 1.0).cdf(both.float()).double()
    # Kolmogorov-Smirnov
    assert (ideal - torch.linspace(0, 1, len(both), dtype=torch.float64)).abs().max() < 0.01
    assert secret_normal(torch.Size([3, 0, 2])).shape == (3, 0, 2)
    assert secret_normal(torch.Size([])).shape == ()


def test_rounds_that_may_have_been_released_before_a_crash_count() -> None:
    assert replace(PRIVACY, lost_rounds=2, lost_fits=1).epsilon(10, 1) == PRIVACY.epsilon(12, 2)
