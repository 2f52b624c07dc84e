"""What must be equal: vectorised and sequential, one client and logistic regression, resumed and
uninterrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedvpa.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedvpa.config import Config, build_config, settings_for
from fedvpa.errors import BadInputError, CheckpointError, NonFiniteUpdateError
from fedvpa.experiment.build import build_method
from fedvpa.federated.algorithm import sample_cohort
from fedvpa.federated.batch import ClientStore
from fedvpa.federated.simulation import CLIENT, Chunk, Simulation, build_simulation
from fedvpa.methods import METHODS
from fedvpa.types import ServerState
from tests.conftest import synthetic_store

SMALL: dict[str, Any] = {
    "model": {"inputs": 8, "latent": 4, "encoder_hidden": (6,)},
    "federation": {"rounds": 4, "cohort": 5, "local_steps": 4, "learning_rate": 0.02},
}
VARIANTS: dict[str, dict[str, Any]] = {method: {"method": method} for method in METHODS}
VARIANTS["fedvpl+anchors"] = {"method": "fedvpl+anchors", "prototypes": {"start_round": 2}}
VARIANTS["fedvpl+ortho"] = {"method": "fedvpl+ortho", "prototypes": {"start_round": 2}}
VARIANTS["paper"] = {"method": "fedvpa-gp", "preset": "paper", "prototypes": {"modes": 2}}
VARIANTS["peers, disjoint, film"] = {
    "method": "fedvpl+mix", "prior": {"kind": "peers", "estimator": "hershey-olsen",
    "weights": "sample-size"},
    "model": {"conditioning": "film", "reward_hidden": 5, "pooling": "attention"},
    "federation": {"batch_size": 6},
}  # fmt: skip
VARIANTS["fixed prototypes, concat, adam"] = {
    "method": "fedvpl+ortho", "prototypes": {"kind": "fixed", "modes": 2},
    "model": {"conditioning": "concat", "reward_hidden": 5, "pooling": "poe"},
    "federation": {"server_optimiser": "adam", "server_learning_rate": 0.1,
    "aggregation": "samples"},
}  # fmt: skip
VARIANTS["sgd with momentum"] = {
    "method": "fedvpl", "objective": {"free_bits": 0.1, "kl_schedule": "cyclical", "samples": 3},
    "federation": {"optimiser": "sgd", "momentum": 0.5, "server_optimiser": "momentum",
    "server_learning_rate": 0.5},
}  # fmt: skip


def config_of(name: str, **federation: Any) -> Config:
    return build_config(
        settings_for(VARIANTS[name]["method"], SMALL, VARIANTS[name].get("preset", "default")),
        VARIANTS[name],
        {"federation": federation},
    )


def train(
    config: Config, store: ClientStore, state: ServerState | None = None, rounds: int | None = None
) -> ServerState:
    algorithm, clients = build_method(config, store)
    state = algorithm.init(store.roster) if state is None else state
    while state.round < (rounds or config.federation.rounds):
        cohort = sample_cohort(config.seed, state.round, len(store), config.federation.cohort)
        state, diagnostics = algorithm.apply(state, clients, cohort)
        assert all(np.isfinite(v) for v in diagnostics.values())
    return state


def assert_states_close(first: ServerState, second: ServerState, tolerance: float) -> None:
    a, b = first.tensors(), second.tensors()
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(
            value, b[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_vectorised_equals_sequential(name: str) -> None:
    store = synthetic_store()
    fast = train(config_of(name), store)
    assert_states_close(fast, train(config_of(name, backend="sequential"), store), 2e-4)
    assert_states_close(fast, train(config_of(name, chunk=2, workers=2), store), 2e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_clients_of_very_different_sizes_equal_sequential_ones(name: str) -> None:
    sizes = [1, 60, 3, 7, 2, 33, 5, 16]
    store = synthetic_store(clients=len(sizes), sizes=sizes)
    config = config_of(name, cohort=0, rounds=3)
    found = build_simulation(config).chunks(range(len(sizes)), sizes, 100)
    assert any(0 < chunk.width < max(sizes) for chunk in found)
    slow = config_of(name, cohort=0, rounds=3, backend="sequential")
    assert_states_close(train(config, store), train(slow, store), 2e-4)


def test_chunks_hold_everybody_once_and_cost_alike() -> None:
    sizes = [1 + (7 * i) % 40 for i in range(300)] + [900, 2000]
    cohort = list(range(0, 604, 2))
    chunks = Simulation().chunks(cohort, sizes, 4000)
    assert sorted(c for chunk in chunks for c in chunk.clients) == cohort
    of = dict(zip(cohort, sizes))
    costs = [sum(CLIENT + of[c] for c in chunk.clients) for chunk in chunks]
    assert max(costs) < 1.3 * min(costs)
    assert Simulation().chunks([5, 3, 8], [4, 4, 4], 100) == [Chunk([5, 3, 8])]


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_equals_uninterrupted_to_the_bit(name: str, tmp_path: Path) -> None:
    store, config = synthetic_store(), config_of(name)
    whole = train(config, store)
    half = train(config, store, rounds=3)
    save_checkpoint(tmp_path / "c", Checkpoint(half, [{"round": 3, "loss": 0.1}], "same", False))
    loaded = load_checkpoint(tmp_path / "c", "same")
    assert loaded.history == [{"round": 3, "loss": 0.1}]
    again = train(config, store, loaded.state)
    for key, value in whole.tensors().items():
        assert torch.equal(value, again.tensors()[key]), key


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    store = synthetic_store()
    state = build_method(config_of("fedvpl"), store)[0].init(store.roster)
    path = tmp_path / "c"
    save_checkpoint(path, Checkpoint(state, [], "mine", True))
    with pytest.raises(CheckpointError, match="other settings"):
        load_checkpoint(path, "yours")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == [path]


def test_btl_of_one_client_is_centralised_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    store = synthetic_store(clients=1, pairs=400, ragged=False)
    noisy = store.difference * torch.where(
        torch.rand(400, 1, generator=torch.Generator().manual_seed(1)) < 0.25, -1.0, 1.0
    )
    store = ClientStore(store.names, store.groups, noisy, None, store.order, store.offset)
    config = config_of(
        "fedavg-btl", rounds=60, local_steps=30, learning_rate=0.5, optimiser="sgd", cohort=1
    )
    weight = train(config, store).params["reward.weight"][0]
    x = noisy.numpy()
    oracle = LogisticRegression(C=1e6, fit_intercept=False, tol=1e-8, max_iter=1000)
    oracle.fit(np.concatenate([x, -x]), np.repeat([1, 0], 400))
    torch.testing.assert_close(
        weight, torch.from_numpy(oracle.coef_[0]).float(), atol=2e-3, rtol=2e-3
    )


def test_peers_prior_of_one_standard_peer_equals_the_gaussian_prior() -> None:
    """With the one peer's posterior at N(0, I) the mixture's KL is the closed form, so training
    is the same."""
    store = synthetic_store(clients=2)
    mixed, clients = build_method(
        build_config(
            SMALL,
            {
                "method": "fedvpl+mix",
                "prior": {"kind": "peers", "estimator": "hershey-olsen", "exclude_self": False},
            },
        ),
        store,
    )
    plain, others = build_method(build_config(SMALL, {"method": "fedvpl"}), store)
    state = mixed.init(store.roster)
    state.clients["seen"][1] = 0  # peer 1 is known, at mean 0 and log-variance 0
    first, _ = mixed.apply(state, clients, [0])
    second, _ = plain.apply(plain.init(store.roster), others, [0])
    for name, value in second.params.items():
        torch.testing.assert_close(first.params[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["vectorised", "sequential"])
@pytest.mark.parametrize("method", ["fedvpl+anchors", "fedavg-btl", "centralised-vpl"])
def test_nan_in_a_client_stops_the_round_and_names_it(method: str, backend: str) -> None:
    store = synthetic_store()
    broken = store.difference.clone()
    broken[store.offset[3] + 1] = torch.nan
    store = ClientStore(store.names, store.groups, broken, store.common, store.order, store.offset)
    algorithm, clients = build_method(config_of(method, backend=backend), store)
    state = algorithm.init(store.roster)
    before = {k: v.clone() for k, v in state.tensors().items()}
    with pytest.raises(NonFiniteUpdateError, match=r"client-3.*round 0"):
        algorithm.apply(state, clients, range(len(store)))
    assert all(torch.equal(v, state.tensors()[k]) for k, v in before.items())


def test_uniform_and_sample_weights_differ_and_server_rate_scales_the_step() -> None:
    store = synthetic_store(pairs=9)
    uniform = train(config_of("fedavg-btl", rounds=1, cohort=0), store).params["reward.weight"]
    by_size = train(
        config_of("fedavg-btl", rounds=1, cohort=0, aggregation="samples"), store
    ).params["reward.weight"]
    half = train(
        config_of("fedavg-btl", rounds=1, cohort=0, server_learning_rate=0.5), store
    ).params["reward.weight"]
    assert not torch.allclose(uniform, by_size)
    torch.testing.assert_close(half, uniform / 2)


def test_prior_logits_stay_private_and_of_absent_peers_untouched() -> None:
    store = synthetic_store()
    config = build_config(
        SMALL, {"method": "fedvpl+mix", "prior": {"kind": "peers"}, "federation": {"cohort": 3}}
    )
    algorithm, clients = build_method(config, store)
    state = algorithm.init(store.roster)
    for _ in range(3):
        state, _ = algorithm.apply(state, clients, [0, 1, 2])
    logits = state.clients["prior_logit"]
    assert logits[:3, :3].abs().max() > 1e-3
    assert torch.equal(logits[3:], torch.zeros_like(logits[3:]))
    assert torch.equal(logits[:, 3:], torch.zeros_like(logits[:, 3:]))
    assert torch.equal(logits.diagonal(), torch.zeros(6))  # nobody is part of its own prior
    assert not any("logit" in row.name for row in algorithm.payload(state))


@pytest.mark.parametrize("start", [0, 1, 3])
def test_anchors_are_fitted_once_and_then_stay(start: int) -> None:
    store = synthetic_store()
    config = build_config(
        SMALL, {"method": "fedvpl+anchors", "prototypes": {"start_round": start, "modes": 2}}
    )
    algorithm, clients = build_method(config, store)
    state, fitted = algorithm.init(store.roster), []
    for _ in range(4):
        state, diagnostics = algorithm.apply(state, clients, range(len(store)))
        fitted.append(state.population.get("mean"))
    first = max(1, start) - 1
    assert all(mean is None for mean in fitted[:first])
    assert all(torch.equal(mean, fitted[first]) for mean in fitted[first:])
    assert "pull" in diagnostics
    with pytest.raises(BadInputError, match="leaves none in which the anchors act"):
        build_config(SMALL, {"method": "fedvpl+anchors", "prototypes": {"start_round": 4}})


def test_withheld_choices_are_not_trained_on_until_the_anchors_are_fitted_and_then_they_are() -> (
    None
):
    config = build_config(SMALL, {"method": "fedvpl+anchors", "prototypes": {"start_round": 2}})
    store = synthetic_store(clients=12, pairs=15)
    _, clients = build_method(config, store)
    everyone = torch.arange(len(store))
    pairs, held = clients.withheld.divided(everyone, 1)
    assert held.sum(-1).tolist() == [round(0.2 * int(n)) for n in store.sizes]
    assert not (held & ~pairs.mask).any()
    other = store.difference.clone()
    for c in range(len(store)):
        mine = slice(int(store.offset[c]), int(store.offset[c + 1]))
        spoilt = pairs.difference[c][held[c]]
        hit = (store.difference[mine].unsqueeze(1) == spoilt).all(-1).any(-1)
        other[mine] = torch.where(
            hit.unsqueeze(-1), -store.difference[mine], store.difference[mine]
        )
    changed = type(store)(store.names, store.groups, other, store.common, store.order, store.offset)
    states = [train(config, s, rounds=1) for s in (store, changed)]
    assert_states_close(*states, tolerance=0.0)
    states = [train(config, s, rounds=3) for s in (store, changed)]
    assert not torch.equal(states[0].params["reward.bilinear"], states[1].params["reward.bilinear"])


@pytest.mark.parametrize("groups", [2, 4])
def test_the_number_of_anchors_is_found_from_the_clients_choices(groups: int) -> None:
    store = synthetic_store(clients=24, pairs=30, inputs=8, groups=groups)
    more = {
        "method": "fedvpl+anchors",
        "prototypes": {"start_round": 8},
        "federation": {"rounds": 9, "cohort": 0, "local_steps": 15},
    }
    config = build_config(SMALL, {"model": {"latent": 8, "encoder_hidden": ()}}, more)
    # too few would merge opposed tastes
    assert groups <= train(config, store).population["weight"].numel() <= groups + 1
