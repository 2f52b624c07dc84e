"""Intervals, controls, splits, diagnostics and population fits."""

from __future__ import annotations

import math

import pytest
import torch

from fedvpa.evaluation.comparison import Result, as_csv, as_markdown, collapsed, compared
from fedvpa.evaluation.diagnostics import (
    cluster_diagnostics,
    component_confidence,
    coverage,
    detection,
    mutual_information,
    posterior_diagnostics,
    prior_weight_diagnostics,
)
from fedvpa.evaluation.protocol import (
    derangement,
    evaluate_controls,
    evaluate_few_shot,
    leaking_accuracy,
    split_trials,
)
from fedvpa.evaluation.statistics import interval, ratio_interval
from fedvpa.federated.population import (
    balanced_labels,
    candidate_modes,
    choose_modes,
    fewest_within_error,
    fit_population,
    summed_scores,
)
from fedvpa.types import PairBatch, Posterior
from tests.conftest import synthetic_store


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Oracle:
    """Knows that the chosen response has the larger sum if the group is even; its state is the
    sign it saw in the context."""

    def adapt(self, context: PairBatch, group: torch.Tensor) -> torch.Tensor:
        return (context.difference.sum(-1) * context.mask).sum(-1, keepdim=True).sign()

    def margin(self, state: torch.Tensor, target: PairBatch) -> torch.Tensor:
        return state * target.difference.sum(-1)

    def neutral(self, users: int) -> torch.Tensor:
        return torch.zeros(users, 1)


def signed_store(clients: int = 8, pairs: int = 10):
    store = synthetic_store(clients, pairs, inputs=3)
    sign = torch.tensor([1.0 if k % 2 == 0 else -1.0 for k in range(clients)]).repeat_interleave(
        store.sizes
    )
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
    group = store.roster.group_index()[1]
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
                rows = [
                    trial.context.difference[k][trial.context.mask[k]],
                    trial.target.difference[k][trial.target.mask[k]],
                ]
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
    population = fit_population(mean, modes, 0)
    assert torch.cdist(centre, population.mean).min(-1).values.max() < 0.5
    assert population.weight.sum() == pytest.approx(1.0, abs=1e-3)
    nobody_differs = fit_population(torch.zeros(9, 3), 4, 0)
    assert nobody_differs.weight.tolist() == [1.0]


def test_the_fewest_components_within_two_standard_errors_are_taken() -> None:
    noise = torch.randn(100, 3, generator=g(5))
    scores = torch.tensor([-0.60, -0.50, -0.49]) + 0.1 * noise
    assert fewest_within_error(summed_scores(scores)) == 1
    assert fewest_within_error(summed_scores(scores - torch.tensor([0.0, 0.3, 0.0]))) == 2
    assert fewest_within_error(summed_scores(scores + torch.tensor([0.2, 0.0, 0.0]))) == 0
    assert fewest_within_error(summed_scores(torch.tensor([[0.1, 0.3, 0.2]]))) == 1
    assert candidate_modes(torch.randn(12, 3, generator=g(6))) == [2, 3, 4]
    assert candidate_modes(torch.zeros(12, 3)) == [1]


def test_balanced_labels_match_clusters_to_the_nearest_prototypes_whatever_their_order() -> None:
    prototype = 5 * torch.eye(6)[:3]
    group = torch.arange(12) % 3
    mean = prototype[group] + 0.3 * torch.randn(12, 6, generator=g())
    assert torch.equal(balanced_labels(mean, prototype, 0), group)
    turned = torch.tensor([2, 0, 1])
    assert torch.equal(
        prototype[turned][balanced_labels(mean, prototype[turned], 0)], prototype[group]
    )
    lopsided = torch.cat([mean, mean[:1].expand(6, -1)])
    counts = torch.bincount(balanced_labels(lopsided, prototype, 0), minlength=3)
    assert counts.tolist() == [6, 6, 6]
    assert balanced_labels(mean[:2], prototype, 0).tolist() == [-1, -1]


def test_the_leaking_protocol_is_perfect_where_the_honest_one_is_chance() -> None:
    store = synthetic_store(8, 12, inputs=3)
    coin = torch.where(torch.rand(store.difference.shape[0], 1, generator=g(1)) < 0.5, 1.0, -1.0)
    random_labels = type(store)(
        store.names, store.groups, store.difference * coin, None, store.order, store.offset
    )
    trials = split_trials(random_labels, 5, 20, 0)
    honest = evaluate_controls(Oracle(), trials, store.roster.group_index()[1], 0)["own"]
    assert abs(interval(honest.accuracy())["mean"] - 0.5) < 0.2
    assert leaking_accuracy(Oracle(), trials) == 1.0


def test_coverage_of_a_calibrated_and_of_an_overconfident_posterior() -> None:
    truth = Posterior(torch.randn(4000, 3, generator=g(2)), torch.zeros(4000, 3))
    assert coverage(Posterior(torch.zeros(4000, 3), torch.zeros(4000, 3)), truth) == pytest.approx(
        0.9, abs=0.01
    )
    assert coverage(Posterior(torch.zeros(4000, 3), torch.full((4000, 3), -4.0)), truth) < 0.2


def test_confidence_agreement_and_detection() -> None:
    before, after = torch.tensor([[0.8, 0.2], [0.4, 0.6]]), torch.tensor([[0.1, 0.9], [0.0, 1.0]])
    assert component_confidence(before, after) == pytest.approx(
        {"confidence": 0.7, "agreement": 0.5}
    )
    found = detection(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, False]))
    assert found == {"corrupted": 3.0, "clean": 1.5, "auc": 1.0}


def test_a_ratio_of_means_and_its_interval() -> None:
    exact = ratio_interval([0.1, 0.2, 0.3], [0.2, 0.4, 0.6])
    assert exact["mean"] == pytest.approx(0.5)
    assert exact["high"] - exact["low"] == pytest.approx(0.0, abs=1e-9)
    generator, hits = g(3), 0
    for _ in range(400):
        bottom = 1 + 0.1 * torch.randn(8, generator=generator)
        top = 0.7 * bottom + 0.1 * torch.randn(8, generator=generator)
        found = ratio_interval(top.tolist(), bottom.tolist())
        hits += found["low"] <= 0.7 <= found["high"]
    assert 0.91 < hits / 400 < 0.99
    assert math.isnan(ratio_interval([1.0, 1.0], [0.0, 0.0])["mean"])


def evaluated(accuracy: float, seconds: float = 1.0, other: float = 0.3) -> dict[str, object]:
    part = {
        "accuracy": {
            "own": {"mean": accuracy}, "other_group": {"mean": other},
            "worst_group": {"mean": accuracy - 0.1},
            "by_group": {"a": {"mean": accuracy + 0.1, "n": 3}, "b": {"mean": accuracy - 0.1,
            "n": 1}},
        },
        "per_client_accuracy": [accuracy, accuracy], "per_client_without_context": [0.5, None],
    }  # fmt: skip
    shot = {"0": {"accuracy": {"mean": 0.5}, "nll": {"mean": 0.7}, "ece": 0.1}}
    return {
        **part,
        "seen": part,
        "few_shot": shot,
        "ece": {"own": 0.1},
        "nll": {"own": {"mean": 0.6}},
        "seconds": seconds,
    }


def test_a_comparison_counts_closure_from_the_better_shared_reward_and_finds_the_rare_group() -> (
    None
):
    accuracy = {"fedvpa-gp": 0.65, "fedavg-btl": 0.5, "fedavg-btl-mlp": 0.55, "oracle-group": 0.67}
    wobble = {0: -0.01, 1: 0.0, 2: 0.01}
    results = [
        Result("s", m, m, seed, evaluated(a + w)) for m, a in accuracy.items() for seed,
        w in wobble.items()
    ]  # fmt: skip
    table = compared("s", "about", results, list(accuracy)) | {"context": 4}
    row = {r["row"]: r for r in table["rows"]}
    assert row["fedvpa-gp"]["closure_seen"]["mean"] == pytest.approx(0.10 / 0.12)
    assert row["fedavg-btl"]["closure_seen"] is None
    assert row["fedavg-btl"]["difference_unseen"]["mean"] == pytest.approx(-0.15)
    assert row["fedavg-btl"]["difference_unseen"]["high"] == pytest.approx(-0.15)
    assert row["fedvpa-gp"]["rarest_group"]["mean"] == pytest.approx(0.55)
    assert row["fedvpa-gp"]["worst_group"]["mean"] == pytest.approx(0.55)
    assert "| fedvpa-gp | 0.650" in as_markdown([table])
    assert as_csv(results).count("\n") == 13
    assert not collapsed(evaluated(0.6))
    assert collapsed(evaluated(0.6, other=0.59))
