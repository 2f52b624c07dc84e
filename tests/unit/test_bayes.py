"""Bayes under the mixture prior: posterior, gradients, divisions by content, and the choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from fedvpa.config import build_config
from fedvpa.data.content import groups_apart, seen_before, units_of
from fedvpa.errors import BadInputError, NonFiniteUpdateError
from fedvpa.evaluation.protocol import given_trial, split_trials
from fedvpa.experiment.build import build_method
from fedvpa.federated.batch import ClientStore, build_store
from fedvpa.federated.bayes.choice import Option, Verdict, chosen, verdict
from fedvpa.federated.bayes.joined import (
    joined,
    joined_slopes,
    joined_widths,
    parted,
    parted_slopes,
    parted_widths,
    sizes_of,
)
from fedvpa.federated.bayes.messages import judged
from fedvpa.federated.bayes.models import KINDS, Models, Structure, Width, groups_of, structures
from fedvpa.federated.content import ALL, STRADDLES, Divider, folds_of, outside
from fedvpa.federated.exchanges import EXCHANGES, layout
from fedvpa.functional.laplace import (
    at_centres,
    laplace,
    mixed_log_odds,
    predicted,
    predictive_slope,
    sampled_slope,
)
from fedvpa.types import ServerState
from tests.conftest import synthetic_store


def some(n: int = 9, d: int = 3, m: int = 2) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "difference": torch.randn(4, n, 5, generator=g, dtype=torch.float64),
        "weight": torch.randn(5, generator=g, dtype=torch.float64) * 0.5,
        "bilinear": torch.randn(d, 5, generator=g, dtype=torch.float64) * 0.5,
        "centre": torch.randn(m, d, generator=g, dtype=torch.float64),
        "variance": torch.rand(m, generator=g, dtype=torch.float64) + 0.5,
        "known": (torch.rand(4, n, generator=g) < 0.6).double(),
    }


def test_newton_ends_at_the_mode_and_without_context_at_the_prior() -> None:
    s = some()
    offset, design = s["difference"] @ s["weight"], s["difference"] @ s["bilinear"].T
    found = laplace(offset, design, s["known"], s["centre"], s["variance"], steps=12)
    z = found.mode.clone().requires_grad_(True)
    margin = offset.unsqueeze(-2) + z @ design.mT
    value = (logsigmoid(margin) * s["known"].unsqueeze(-2)).sum()
    value = value - 0.5 * ((z - s["centre"]).square() / s["variance"].unsqueeze(-1)).sum()
    (slope,) = torch.autograd.grad(value, z)
    assert slope.abs().max() < 1e-6
    four = laplace(offset, design, s["known"], s["centre"], s["variance"])
    assert (four.mode - found.mode).abs().max() < 1e-2
    nobody = laplace(offset, design, 0 * s["known"], s["centre"], s["variance"])
    torch.testing.assert_close(nobody.mode, s["centre"].expand_as(nobody.mode))
    assert nobody.evidence.abs().max() < 1e-9
    diagonal = nobody.covariance.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal, s["variance"].unsqueeze(-1).expand_as(diagonal))


def test_newton_does_not_run_away_where_choices_are_certain() -> None:
    design = 30.0 * torch.ones(1, 40, 1)
    found = laplace(
        torch.zeros(1, 40), design, torch.ones(1, 40), torch.zeros(1, 1), torch.tensor([9.0])
    )
    assert 0 < float(found.mode) < 3
    assert found.evidence.isfinite().all()


def test_evidence_is_close_to_the_integral() -> None:
    s = some(n=5, d=1, m=1)
    offset, design = s["difference"] @ s["weight"], s["difference"] @ s["bilinear"].T
    found = laplace(offset, design, s["known"], s["centre"], s["variance"], steps=12)
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    margin = offset.unsqueeze(-1) + design * grid
    log_density = (logsigmoid(margin) * s["known"].unsqueeze(-1)).sum(1)
    prior = torch.distributions.Normal(s["centre"][0, 0], s["variance"].sqrt()[0])
    total = torch.logsumexp(log_density + prior.log_prob(grid), -1) + (grid[1] - grid[0]).log()
    torch.testing.assert_close(found.evidence[:, 0], total, atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", ["wide", "groups", "points", "sampled"])
def test_gradients_in_closed_form_are_those_of_autograd(kind: str) -> None:
    s = some(m=1 if kind == "wide" else 3)
    w, b = (s[name].clone().requires_grad_(True) for name in ("weight", "bilinear"))
    offset, design = s["difference"] @ w, s["difference"] @ b.T
    with torch.no_grad():
        infer = at_centres if kind == "points" else laplace
        more = () if kind == "points" else (s["variance"],)
        found = infer(offset, design, s["known"], s["centre"], *more)
        log_share = torch.log_softmax(found.evidence, -1)
    target = 1 - s["known"]
    if kind == "sampled":
        z = found.mode[:, 0].expand(2, 4, 3) + torch.tensor([0.1, -0.3]).view(2, 1, 1)
        margin = offset + (design @ z.unsqueeze(-1)).squeeze(-1)
        loss = (-logsigmoid(margin).mean(0) * target).sum()
        slope = sampled_slope(z, offset.detach(), design.detach())
    else:
        odds = predicted(offset, design, found)
        loss = -(logsigmoid(mixed_log_odds(log_share, odds.log_odds)) * target).sum()
        with torch.no_grad():
            prediction = predicted(offset, design, found)
            slope = predictive_slope(found, log_share.exp(), prediction, design)
    loss.backward()
    x = s["difference"]
    torch.testing.assert_close(torch.einsum("cn,cnp->p", slope.offset * target, x), w.grad)
    own = slope.design * target.unsqueeze(-1)
    torch.testing.assert_close(torch.einsum("cnd,cnp->dp", own, x), b.grad)
    torch.testing.assert_close((slope.loss * target).sum(), loss.detach())


CONTENT = torch.tensor([
    # three prompts of one client; the first two pairs share a response
    [1, 10, 11], [1, 10, 12], [2, 20, 21], [3, 30, 31], [4, 40, 41], [5, 50, 51],
    # another one with a single prompt whose responses repeat
    [9, 90, 91], [9, 91, 92], [9, 92, 93], [9, 93, 90], [9, 90, 92],
])  # fmt: skip
OFFSET = np.array([0, 6, 11])


def test_units_are_groups_of_pairs_or_responses() -> None:
    units = units_of(CONTENT.numpy(), OFFSET, "new")
    assert units.left[0] == units.left[1] == units.right[0]  # one prompt: one unit
    assert len(set(units.left[:6].tolist())) == 5
    assert units.pairs[units.left[0]] == 2
    # the second client deals its four responses
    assert (units.left[6:] != units.right[6:]).all()
    assert units.offset.tolist() == [0, 5, 9]
    repeated = units_of(CONTENT.numpy(), OFFSET, "repeated")
    assert repeated.left.tolist() == [*range(6), *range(5)]
    assert groups_apart(CONTENT.numpy()[6:]).tolist() == [0] * 5
    assert seen_before(CONTENT.numpy()[:3], CONTENT.numpy()[:1]).tolist() == [2, 1, 0]


def repeating(seed: int = 0) -> ClientStore:
    """Clients who judge pairs of a few responses to a few prompts."""
    g = torch.Generator().manual_seed(seed)
    differences, contents = [], []
    for _ in range(8):
        prompt = torch.randint(0, 6, (30,), generator=g)
        pair = torch.stack([torch.randperm(5, generator=g)[:2] for _ in range(30)])
        contents.append(torch.cat([prompt.unsqueeze(1), 100 + 5 * prompt.unsqueeze(1) + pair], 1))
        differences.append(torch.randn(30, 4, generator=g))
    names = [f"c{k}" for k in range(8)]
    ones = [torch.ones(30)] * 8
    return build_store(names, [None] * 8, differences, None, ones, contents)


def test_no_response_is_on_both_sides_of_a_division() -> None:
    store = repeating()
    sides = Divider.of(store, "new").sides(store, torch.arange(8))
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        share = torch.rand(8, generator=g) * 0.9
        key = torch.rand(sides.exists.shape, generator=g)
        context, target = sides.dealt(key, share)
        assert target.any(-1).all()
        for c in range(8):
            own = store.content[30 * c : 30 * (c + 1)]  # type: ignore[index]
            left, right = own[context[c]], own[target[c]]
            assert not set(left[:, 1:].flatten().tolist()) & set(right[:, 1:].flatten().tolist())


@pytest.mark.parametrize("content", ["new", "repeated"])
def test_trials_tell_what_was_judged_before(content: Any) -> None:
    store = repeating()
    trials = split_trials(store, 8, 3, 0, content)
    seen = torch.cat([t.overlap[t.target.mask] for t in trials])  # type: ignore[index]
    assert (seen == 0).all() if content == "new" else (seen > 0).any()
    assert all(int(t.context.mask.sum(-1).max()) <= 8 for t in trials)
    trial = given_trial(store, repeating(1), content)
    scored = trial.mask.sum() / trial.target.mask.sum()
    assert (scored < 1) == (content == "new")


def test_all_clients_agree_on_the_fold_of_a_prompt() -> None:
    content = repeating().content
    assert content is not None
    fold = folds_of(content, torch.arange(len(content)), 3, by_prompt=True)
    for prompt in content[:, 0].unique():
        assert fold[content[:, 0] == prompt].unique().numel() == 1
    by_response = folds_of(content, torch.arange(len(content)), 3, by_prompt=False)
    assert (by_response == STRADDLES).any()
    # a model of everything reads what touches two folds, a model without a fold does not
    assert outside(by_response, torch.tensor(ALL)).all()
    for f in range(3):
        read = content[outside(by_response, torch.tensor(f)), 1:]
        assert not (read % 3 == f).any()
    kept = by_response >= 0
    assert (content[kept, 1] % 3 == by_response[kept]).all()


def test_the_smallest_width_within_one_error_is_taken_and_only_below_a_shared_reward() -> None:
    wide, shared = Structure("directions", 2, 0.01), Structure("shared", 1, 0.01)
    given = [Option(shared, Width(0.0), 0), *(Option(wide, Width(w), 1) for w in (0.0, 0.5, 1.0))]
    pairs = torch.full((50,), 10.0)
    noise = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 0.5
    base = torch.tensor([-6.0, -6.0, -5.5, -5.49]) + 0 * noise[:, :1]
    found = verdict(judged(base + noise, base, pairs, 3))
    assert chosen(given, found) == 2
    worse = torch.tensor([-5.0, -6.0, -5.5, -5.49]) + 0 * noise[:, :1]
    assert given[chosen(given, verdict(judged(worse, worse, pairs, 0)))].structure == shared
    # by pair: a client of many pairs counts for many
    one = verdict(
        judged(torch.tensor([[-1.0], [-30.0]]), torch.ones(2, 1), torch.tensor([1.0, 99.0]), 0)
    )
    assert float(one.nll) == pytest.approx(0.31)


def test_simpler_structures_win_where_they_are_practically_the_same() -> None:
    shared, wide = Structure("shared", 1, 0.01), Structure("directions", 4, 0.01)
    two, six = Structure("groups", 2, 0.01), Structure("groups", 6, 0.01)
    given = [Option(s, Width(), i) for i, s in enumerate((shared, wide, two, six))]

    def kind(*loss: float, error: float = 0.004) -> Structure:
        errors = torch.full((4,), error)
        found = Verdict(torch.tensor(loss), torch.ones(4), errors, 40.0, 900.0)
        return given[chosen(given, found)].structure

    assert kind(0.69, 0.62, 0.625, 0.621) == two  # within two errors of the best groups
    assert kind(0.69, 0.62, 0.64, 0.621) == six
    assert kind(0.69, 0.62, 0.64, 0.63) == wide
    assert kind(0.69, 0.67, 0.6705, 0.669) == wide  # there is little to be gained
    assert kind(0.69, 0.67, 0.64, 0.66) == two
    assert kind(0.623, 0.62, 0.62, 0.62) == shared


def test_what_is_tried_fits_the_data() -> None:
    few = structures("auto", "auto", "auto", latent=16, inputs=8, pairs=54)
    assert {s.kind for s in few} == {"shared", "directions"}
    assert max(s.order for s in few) <= 8
    assert min(s.ridge for s in few) > 1e-3
    assert list(groups_of(16, clients=6)) == [2]
    four = structures("groups", 4, 0.01, latent=16, inputs=8, pairs=900)
    assert [(s.kind, s.order) for s in four] == [("shared", 1), ("directions", 8)]


def test_models_and_sums_travel_and_come_back() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    def model(kind: str, order: int) -> Models:
        m = order if kind == "groups" else 1
        size = torch.tensor([m, order, KINDS.index(kind)]).expand(4, 3)
        return Models(
            random(4, 6), random(4, order, 6), random(4, m, order), random(4, m), random(4, m),
            torch.tensor([-1, 0, 1, 2]), size, torch.zeros(4), torch.ones(4, 6),
        )  # fmt: skip

    models = [model("shared", 1), model("directions", 3), model("groups", 2)]
    sent = joined(models)
    sizes = sizes_of([m.structure for m in models], 4, 6)
    asked = {f.name: f for f in EXCHANGES["slopes"].request}
    for name, value in sent.items():
        assert value.shape == tuple(sizes.get(s, 3) for s in asked[name].shape.split()), name
    for one, other in zip(models, parted(sent)):
        assert all(torch.equal(a, b) for a, b in zip(one, other))
    store = synthetic_store(clients=5, pairs=9, inputs=6)
    _, clients = build_method(build_config({"model": {"inputs": 6, "latent": 6}}), store)
    ((_, sums),) = clients.slopes(models, range(5), 0, True)
    reply = joined_slopes(sums)
    shapes = {n: shape for n, (shape, _) in layout(EXCHANGES["slopes"].reply, sizes).items()}
    assert {name: tuple(value.shape) for name, value in reply.items()} == shapes
    for one, other in zip(sums, parted_slopes(reply, models)):
        assert all(torch.equal(a, b) for a, b in zip(one, other))
    widths = [[Width(0.0)], [Width(0.5), Width(1.0)], [Width(1.0, 0.0)]]
    assert parted_widths(joined_widths(widths)) == widths
    for name, value in (("size", sent["size"] * 1000), ("weight", sent["weight"][:, :2])):
        with pytest.raises(ValueError, match="models"):
            parted(sent | {name: value})


def trained(store: ClientStore, **population: Any) -> tuple[Any, ServerState]:
    config = build_config({
        "model": {"inputs": 8, "latent": 8}, "population": population,
        "federation": {"rounds": 20, "cohort": 0},
    })  # fmt: skip
    algorithm, clients = build_method(config, store)
    state = algorithm.init(store.roster)
    for _ in range(20):
        state, row = algorithm.apply(state, clients, range(len(store)))
        assert row["kl"] >= 0
    return algorithm, algorithm.finalise(state, clients)


def test_opposed_groups_are_told_apart_and_centres_stay_orthogonal() -> None:
    store = synthetic_store(clients=16, pairs=24)
    algorithm, state = trained(store, structure="groups", order=2)
    centre = state.population["mean"]
    gram = centre @ centre.T
    torch.testing.assert_close(gram, 1.5**2 * torch.eye(2))
    label = state.clients["label"]
    groups = store.roster.group_index()[1]
    assert (label == groups).all() or (label == 1 - groups).all()
    predictor = algorithm.predictor(state)
    batch = store.batch(range(16))
    own = predictor.adapt(batch, groups)
    right = (predictor.margin(own, batch) > 0)[batch.mask].float().mean()
    assert right > 0.9
    assert predictor.named is not None
    assert predictor.named.shape == (2, 8)


@pytest.mark.parametrize("structure", ["groups", "directions"])
def test_sampled_latents_train_as_well(structure: str) -> None:
    store = synthetic_store(clients=12, pairs=20)
    algorithm, state = trained(store, structure=structure, order=2, samples=2)
    batch, groups = store.batch(range(12)), store.roster.group_index()[1]
    predictor = algorithm.predictor(state)
    right = predictor.margin(predictor.adapt(batch, groups), batch) > 0
    assert right[batch.mask].float().mean() > 0.75
    with pytest.raises(BadInputError, match="does not fit a latent"):
        build_config({"population": {"order": 17}})


def test_clients_may_count_alike_and_features_that_are_not_finite_name_their_client() -> None:
    store = synthetic_store(clients=9, pairs=20)
    config = {"model": {"inputs": 8, "latent": 8}, "federation": {"rounds": 2, "cohort": 0}}
    found = {}
    for way in ("samples", "uniform"):
        algorithm, clients = build_method(
            build_config(config, {"federation": {"aggregation": way}}), store
        )
        state, _ = algorithm.apply(algorithm.init(store.roster), clients, range(9))
        found[way] = state.params["shared.weight"]
    assert not torch.equal(found["samples"], found["uniform"])
    broken = store.difference.clone()
    broken[25] = torch.nan
    spoilt = ClientStore(store.names, store.groups, broken, None, store.order, store.offset)
    algorithm, clients = build_method(build_config(config), spoilt)
    with pytest.raises(NonFiniteUpdateError, match="client-1"):
        algorithm.apply(algorithm.init(store.roster), clients, range(9))


def test_settings_that_leave_little_open_are_served_or_refused() -> None:
    store = synthetic_store(clients=4, pairs=12)
    _, few = trained(store, structure="groups")
    assert few.population["mean"].shape[0] == 2
    _, wide = trained(
        synthetic_store(clients=6, pairs=12, inputs=8), structure="directions", order=8
    )
    assert wide.params["reward.bilinear"].shape == (8, 8)
    algorithm, state = trained(store, samples=2)
    assert algorithm.predictor(state).shared_margin(store.batch(range(4))).isfinite().all()
    with pytest.raises(BadInputError, match="1 group is one reward"):
        trained(store, structure="groups", order=1)


def test_a_shared_reward_has_no_effect_of_z_where_latents_are_sampled() -> None:
    store = synthetic_store(clients=6, pairs=12)
    given = {"model": {"inputs": 8, "latent": 8}, "population": {"samples": 2}}
    algorithm, clients = build_method(build_config(given), store)
    state, _ = algorithm.apply(algorithm.init(store.roster), clients, range(6))
    shared = [
        state.components[name.replace("size", "bilinear")]
        for name, size in state.components.items()
        if name.endswith("/size") and int(size[0, 2]) == KINDS.index("shared")
    ]
    assert shared
    assert not any(value.any() for value in shared)


def test_users_of_one_reward_get_one_reward() -> None:
    store = synthetic_store(clients=24, pairs=16, groups=1, seed=3)
    g = torch.Generator().manual_seed(5)
    flip = torch.where(torch.rand(len(store.difference), 1, generator=g) < 0.25, -1.0, 1.0)
    noisy = ClientStore(
        store.names, store.groups, store.difference * flip, None, store.order, store.offset
    )
    algorithm, state = trained(noisy)
    predictor = algorithm.predictor(state)
    batch = noisy.batch(range(24))
    own = predictor.margin(predictor.adapt(batch, torch.full((24,), -1)), batch)
    shared = predictor.shared_margin(batch)
    loss = [float(-logsigmoid(m)[batch.mask].mean()) for m in (own, shared)]
    assert abs(loss[0] - loss[1]) < 0.02
    told = algorithm.told(state)
    assert told["kind"] in ("shared", "directions")
    assert told["width"] <= 0.5
