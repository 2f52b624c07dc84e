"""fedvpa-gp under differential privacy: what a client tells is bounded, what is released has noise,
and what cannot be afforded is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedvpa.config import build_config
from fedvpa.errors import BadInputError
from fedvpa.experiment.build import build_method
from fedvpa.federated.accounting import BudgetError, privacy_of
from fedvpa.federated.bayes.bounded import Bounded, bounded_gains, bounded_sum
from fedvpa.federated.bayes.clients import BayesClients
from fedvpa.federated.bayes.messages import Slopes
from fedvpa.federated.bayes.models import Models, Width, unpacked
from fedvpa.federated.bayes.private import EFFECTS, PrivateBayes
from fedvpa.types import ServerState
from tests.conftest import synthetic_store

pytest.importorskip("dp_accounting")
CLIENTS = 40
WHAT_IT_TAKES: dict[str, Any] = {"data": {"public": "p"}, "privacy": {"enabled": True}}


def built(**more: Any) -> tuple[PrivateBayes, BayesClients]:
    given = WHAT_IT_TAKES | {
        "model": {"inputs": 8, "latent": 8}, "population": {"order": 2},
        "federation": {"rounds": 30, "cohort": 20},
    }  # fmt: skip
    config = build_config(given, more)
    algorithm, clients = build_method(config, synthetic_store(clients=CLIENTS, pairs=24))
    assert isinstance(algorithm, PrivateBayes)
    return algorithm, clients


def trained(algorithm: PrivateBayes, clients: BayesClients, rounds: int = 30) -> ServerState:
    state = algorithm.init(clients.roster)
    for _ in range(rounds):
        state, _ = algorithm.apply(state, clients, range(20))
    return algorithm.finalise(state, clients)


def models_of(algorithm: PrivateBayes, clients: BayesClients) -> list[Models]:
    return unpacked(algorithm.init(clients.roster).components)[0]


def test_one_client_moves_the_sum_by_the_bound_at_the_most() -> None:
    g = torch.Generator().manual_seed(0)

    def slopes(d: int) -> Slopes:
        size = 10.0 ** torch.arange(-3.0, 2.0)
        weight = torch.randn(2, 5, 7, generator=g) * size.view(-1, 1)
        bilinear = torch.randn(2, 5, d, 7, generator=g) * size.view(-1, 1, 1)
        return Slopes(weight, bilinear, *[torch.ones(2, 5)] * 6)

    found = [slopes(1), slopes(3)]
    each = [
        bounded_sum([Slopes(*(v[:, c : c + 1] for v in own)) for own in found], 0.5)
        for c in range(5)
    ]
    assert all(float(one.norm) <= 0.5 * (1 + 1e-5) for one in each)
    assert float(each[-1].norm) == pytest.approx(0.5)
    torch.testing.assert_close(each[0].bilinear[:, 1:], found[1].bilinear[:, 0])  # short enough
    added = Bounded(*(torch.stack(v).sum(0) for v in zip(*each)))
    torch.testing.assert_close(bounded_sum(found, 0.5), added)


def test_gains_are_per_target_and_bounded() -> None:
    total = torch.tensor([[-4.0, -2.0, -5.0], [-9.0, -1.0, -9.0], [0.0, 0.0, 0.0]])
    pairs = torch.tensor([10.0, 2.0, 0.0])
    found = bounded_gains(total, pairs, 0.5)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.2 + 0.5, -0.1]))


def test_without_noise_groups_are_told_apart_and_the_width_is_chosen() -> None:
    algorithm, clients = built(privacy={"noise": 0.0, "fit_noise": 0.0})
    state = trained(algorithm, clients)
    told = algorithm.told(state)
    assert told["kind"] == "directions"
    assert told["width"] in EFFECTS
    context = clients.store.batch(range(CLIENTS))
    predictor = algorithm.predictor(state)
    own = predictor.adapt(context, torch.zeros(CLIENTS, dtype=torch.long))
    right = predictor.margin(own, context) > 0
    none = predictor.margin(predictor.neutral(CLIENTS), context) > 0
    assert right.float().mean() > none.float().mean() + 0.1


def test_where_noise_hides_the_gain_a_shared_reward_is_served() -> None:
    algorithm, clients = built(privacy={"noise": 0.0, "fit_noise": 1e4})
    state = trained(algorithm, clients, 3)
    # whatever the noise says, a gain must exceed one standard deviation of it
    noised = algorithm.release.noise("fit", state.round)(torch.Size([len(EFFECTS)]))
    assert (algorithm.told(state)["kind"] == "shared") == bool(noised.max() < 1.0)


def test_a_width_that_is_given_costs_nothing_and_nothing_is_kept_from_the_models() -> None:
    algorithm, clients = built(population={"width": 0.7})
    assert not algorithm.release.privacy.fits
    assert {int(m.fold[0]) for m in models_of(algorithm, clients)} == {-1}
    assert algorithm.told(trained(algorithm, clients, 2))["width"] == pytest.approx(0.7)
    judging, clients = built()
    assert judging.release.privacy.epsilon(5, 1) > algorithm.release.privacy.epsilon(5, 0)


def test_noise_is_that_of_the_accounting() -> None:
    quiet, clients = built(privacy={"noise": 0.0, "clip": 0.3})
    loud, _ = built(privacy={"noise": 2.0, "clip": 0.3})
    p = loud.release.privacy
    seen: list[torch.Tensor] = []

    class Watched(PrivateBayes):
        def _stepped(self, models: Any, slots: Any, weight: Any, bilinear: Any) -> Any:
            seen.extend([weight.flatten(), bilinear.flatten()])
            return super()._stepped(models, slots, weight, bilinear)

    for algorithm in (quiet, loud):
        watched = Watched(**vars(algorithm))
        for r in range(40):
            state = algorithm.init(clients.roster)
            watched.apply(ServerState(r, *list(vars(state).values())[1:]), clients, range(20))
    half = len(seen) // 2
    noise = torch.cat(seen[half:]) - torch.cat(seen[:half])
    assert noise.std() * p.expected == pytest.approx(p.noise * p.clip, rel=0.05)


def test_features_that_are_not_finite_stop_nothing_and_add_nothing() -> None:
    algorithm, clients = built()
    models = models_of(algorithm, clients)
    ((_, whole),) = clients.bounded(models, [3], 0)
    clients.store.difference[clients.store.owner == 3] = torch.nan
    ((_, found),) = clients.bounded(models, [3], 0)
    assert float(whole.norm) > 0
    assert float(found.norm) == 0
    widths = [[Width(0.0)], [Width(1.0)]]
    assert clients.gains(models, widths).isfinite().all()


def test_rounds_end_at_the_budget_and_nobody_may_be_drawn() -> None:
    algorithm, clients = built(privacy={"noise": 1.0})
    privacy = algorithm.release.privacy
    budget = (privacy.epsilon(2, 1) + privacy.epsilon(3, 1)) / 2
    short, clients = built(privacy={"noise": 1.0, "budget": budget})
    state = short.init(clients.roster)
    for cohort in (range(20), []):
        state, row = short.apply(state, clients, cohort)
    assert row["epsilon"] == pytest.approx(privacy.epsilon(2, 1))
    assert state.clients["seen"].eq(1).all()  # who took part is private
    with pytest.raises(BudgetError, match="round 3 would take it"):
        short.apply(state, clients, range(20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"population": {"structure": "groups"}}, "structure must be directions"),
        ({"population": {"order": "auto"}}, "must be numbers"),
        ({"population": {"ridge": "auto"}}, "must be numbers"),
        ({"data": {"public": None}}, "data.public must name"),
        ({"federation": {"aggregation": "samples"}}, "aggregation must be uniform"),
        ({"privacy": {"latent_clip": 1.0}}, "latent_clip is set but would not be read"),
        ({"privacy": {"enabled": False, "gain_clip": 1.0}}, "privacy.enabled is false"),
    ],
)
def test_what_it_does_not_go_with(change: dict[str, Any], message: str) -> None:
    assert privacy_of(build_config(WHAT_IT_TAKES), 100) is not None
    with pytest.raises(BadInputError, match=message):
        build_config(WHAT_IT_TAKES, change)
