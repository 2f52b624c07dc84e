"""Intervals, controls, splits, diagnostics and population fits."""

from __future__ import annotations

import math

import pytest
import torch

from fedvpa.evaluation.diagnostics import (
    cluster_diagnostics,
    mutual_information,
    posterior_diagnostics,
    prior_weight_diagnostics,
)
from fedvpa.evaluation.protocol import derangement, evaluate_controls, evaluate_few_shot, split_trials
from fedvpa.evaluation.statistics import interval
from fedvpa.federated.population import balanced_labels, choose_modes, fit_population
from fedvpa.types import PairBatch, Posterior
from tests.conftest import synthetic_store


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Oracle:
    """Knows that the chosen response has the larger sum if the group is even; its state is the sign it saw in the context."""

    def adapt(self, context: PairBatch, group: torch.Tensor) -> torch.Tensor:
        return (context.difference.sum(-1) * context.mask).sum(-1, keepdim=True).sign()

    def margin(self, state: torch.Tensor, target: PairBatch) -> torch.Tensor:
        return state * target.difference.sum(-1)

    def neutral(self, users: int) -> torch.Tensor:
        return torch.zeros(users, 1)


def signed_store(clients: int = 8, pairs: int = 10):
    store = synthetic_store(clients, pairs, inputs=3)
    sign = torch.tensor([1.0 if k % 2 == 0 else -1.0 for k in range(clients)]).repeat_interleave(store.sizes)
    difference = store.difference * (store.difference.sum(-1).sign() * sign).unsqueeze(-1)
    return type(store)(store.names, store.groups, difference, None, store.order, store.offset)


def test_intervals_are_student_t_and_ignore_missing_clients() -> None:
    found = interval([0.5, 0.7, float("nan"), 0.6])
    assert found["n"] == 3
    assert found["mean"] == pytest.approx(0.6)
    assert found["high"] - found["mean"] == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert math.isnan(interval([0.5])["low"])


def test_controls_tell_a_used_state_from_an_unused_one() -> None:
    store = signed_store()
    group = store.group_index()[1]
    scores = evaluate_controls(Oracle(), split_trials(store, 4, 3, 0), group, 0)
    mean = {name: interval(s.accuracy())["mean"] for name, s in scores.items()}
    assert mean["own"] == 1.0
    assert mean["other_group"] == 0.0
    assert mean["flipped"] == 0.0
    assert mean["prior_mean"] == 0.5
    assert 0.0 < mean["shuffled"] < 1.0
    curve = evaluate_few_shot(Oracle(), split_trials(store, 4, 3, 0), group, [0, 1, 4])
    assert [interval(s.accuracy())["mean"] for s in curve.values()] == [0.5, 1.0, 1.0]


def test_context_and_targets_share_no_pair_and_cover_all() -> None:
    store = synthetic_store(5, 9)
    for context in (0, 2, 50):
        for trial in split_trials(store, context, 2, 0):
            for k in range(5):
                rows = [trial.context.difference[k][trial.context.mask[k]], trial.target.difference[k][trial.target.mask[k]]]
                assert len(rows[0]) == min(context, int(store.sizes[k]) // 2)
                together = torch.cat(rows)
                assert len(together.unique(dim=0)) == int(store.sizes[k]) == len(together)


def test_derangements_move_everybody() -> None:
    for n in (2, 3, 9):
        order = derangement(n, g(n))
        assert sorted(order.tolist()) == list(range(n))
        assert (order != torch.arange(n)).all()


def test_diagnostics_of_separate_and_of_collapsed_latents() -> None:
    group = torch.arange(20) % 2
    apart = torch.randn(20, 4, generator=g()) * 0.1 + 5 * group.unsqueeze(-1)
    sharp = torch.full((20, 4), -6.0)
    found = cluster_diagnostics(apart, group)
    assert found["ari"] == 1.0
    assert found["linear_probe"] == 1.0
    assert found["between_within"] > 100
    assert posterior_diagnostics(Posterior(apart, sharp))["active_units"] == 4
    nothing = torch.zeros(20, 4)
    assert posterior_diagnostics(Posterior(nothing, nothing))["active_units"] == 0
    assert mutual_information(Posterior(nothing, nothing)) == pytest.approx(0, abs=1e-5)
    distinct = torch.randn(20, 4, generator=g()) * 50
    assert mutual_information(Posterior(distinct, sharp)) == pytest.approx(math.log(20), abs=1e-3)
    assert cluster_diagnostics(apart, torch.zeros(20, dtype=torch.long))["ari"] is None


def test_prior_weight_entropy_is_one_for_uniform_and_zero_for_certain() -> None:
    group = torch.tensor([0, 0, 1, 1])
    uniform = torch.log_softmax(torch.zeros(4, 4).fill_diagonal_(-torch.inf), -1)
    found = prior_weight_diagnostics(uniform, group, group)
    assert found["entropy"] == pytest.approx(1.0)
    assert found["same_group_weight"] == pytest.approx(1 / 3)
    certain = torch.full((4, 4), -torch.inf)
    certain[torch.arange(4), torch.tensor([1, 0, 3, 2])] = 0.0
    found = prior_weight_diagnostics(certain, group, group)
    assert found["entropy"] == 0.0
    assert found["same_group_weight"] == 1.0


@pytest.mark.parametrize("modes", [2, 3, 5])
def test_the_number_of_modes_is_found_and_components_lie_on_the_groups(modes: int) -> None:
    centre = 6 * torch.eye(8)[:modes]
    group = torch.arange(40) % modes
    mean = centre[group] + 0.4 * torch.randn(40, 8, generator=g())
    assert choose_modes(mean.double().numpy(), 0) == modes
    population = fit_population(mean, None, 0)
    assert torch.cdist(centre, population.mean).min(-1).values.max() < 0.5
    assert population.weight.sum() == pytest.approx(1.0, abs=1e-3)
    collapsed = fit_population(torch.zeros(9, 3), None, 0)
    assert collapsed.weight.tolist() == [1.0]


def test_balanced_labels_match_clusters_to_the_nearest_prototypes_whatever_their_order() -> None:
    prototype = 5 * torch.eye(6)[:3]
    group = torch.arange(12) % 3
    mean = prototype[group] + 0.3 * torch.randn(12, 6, generator=g())
    assert torch.equal(balanced_labels(mean, prototype, 0), group)
    turned = torch.tensor([2, 0, 1])
    assert torch.equal(prototype[turned][balanced_labels(mean, prototype[turned], 0)], prototype[group])
    lopsided = torch.cat([mean, mean[:1].expand(6, -1)])
    counts = torch.bincount(balanced_labels(lopsided, prototype, 0), minlength=3)
    assert counts.tolist() == [6, 6, 6]
    assert balanced_labels(mean[:2], prototype, 0).tolist() == [-1, -1]
