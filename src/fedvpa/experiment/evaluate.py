"""Evaluate a run on seen and unseen clients; every number of the report comes from here (keys:
docs/evaluation.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fedvpa import __version__
from fedvpa.config import FEDERATION
from fedvpa.evaluation.diagnostics import (
    cluster_diagnostics,
    component_confidence,
    coverage,
    detection,
    posterior_diagnostics,
    prior_weight_diagnostics,
    prototype_cosines,
    switch_rate,
)
from fedvpa.evaluation.protocol import (
    Scores,
    Trial,
    adapted,
    by_group,
    evaluate_controls,
    evaluate_few_shot,
    given_trial,
    leaking_accuracy,
    margins,
    posteriors,
    shares,
    split_trials,
)
from fedvpa.evaluation.statistics import interval, share
from fedvpa.evaluation.verdict import by_overlap, compared_states, verdict_of
from fedvpa.experiment.run import Run, open_run
from fedvpa.experiment.subjects import EvaluationSettings, Subjects, subjects_of
from fedvpa.experiment.train import manifest
from fedvpa.federated.algorithm import LatentPredictor
from fedvpa.federated.batch import ClientStore, Roster, concatenate
from fedvpa.federated.priors.peers import PeersPrior
from fedvpa.federated.variational import FederatedVariational
from fedvpa.functional.preference import mean_choice_loss
from fedvpa.records import Progress
from fedvpa.types import PairBatch, Posterior

CONTEXT_SIZES = (0, 1, 2, 4, 8, 16, 32)
_NOBODY: dict[str, Any] = {
    "accuracy": {}, "nll": {}, "ece": {}, "few_shot": {}, "per_client_accuracy": [],
    "per_client_without_context": [], "targets_scored": 0, "by_pair": {}, "by_overlap": {},
    "differences": {},
}  # fmt: skip
"""What there is to say of unseen clients where nobody is unseen."""


@dataclass(frozen=True)
class Evaluation:
    """The results as JSON, and the posteriors that the latent map draws."""

    results: dict[str, Any]
    seen: Posterior | None
    unseen: Posterior | None
    prototypes: Tensor | None
    group_names: list[str]
    seen_group: Int[Tensor, "k"]
    unseen_group: Int[Tensor, "u"]
    probability: list[float]


def evaluate(
    directory: str, settings: EvaluationSettings, progress: Progress | None = None
) -> Evaluation:
    """Evaluate the run in `directory`; nothing is trained, and no target pair is in any context or
    training set.

    Of a run of a federation only unseen clients can be evaluated; whether its clients hold pairs of
    the evaluation data, nobody here can tell.

    Raises:
        BadInputError: no run there, or unusable evaluation data.
        CheckpointError: the run is unfinished or damaged.
    """
    run = open_run(directory, progress=progress)
    # the clients' pairs are not here: nothing can be said of seen clients
    elsewhere = run.config.data.source == FEDERATION
    if not elsewhere:
        run = open_run(directory, with_clients=True, progress=progress)
    # 1. Whom to evaluate: no pair of theirs was trained on.
    subjects = subjects_of(run, settings, progress)
    names = run.roster.group_index()[0]  # a model that knows groups knows these, in this order
    others = Roster((), ()) if subjects.unseen is None else subjects.unseen.roster
    names += sorted({g for g in others.groups if g is not None} - set(names))
    seen_group, unseen_group = _group_of(run.roster, names), _group_of(others, names)
    # 2. Controls and few-shot curves, of unseen clients and of those that were trained on.
    predictor, content = run.predictor, settings.content or run.config.data.content
    sizes = sorted({s for s in CONTEXT_SIZES if s <= settings.context} | {settings.context})
    unseen_part, seen_part, trials = _NOBODY, None, list[Trial]()
    scores: dict[str, Scores] = {}
    if subjects.unseen is not None:
        trials = split_trials(
            subjects.unseen, settings.context, settings.repeats, settings.seed, content
        )
        unseen_part, scores = _part(predictor, trials, unseen_group, names, sizes, settings.seed)
    if run.store is not None and subjects.held_out is not None and subjects.held_out_pairs:
        trial = given_trial(run.store, subjects.held_out, content)
        seen_part, own = _part(predictor, [trial], seen_group, names, sizes, settings.seed)
        scores, trials = scores or own, trials or [trial]
    results = _described(run, settings, subjects, names) | unseen_part
    results |= {"seen": seen_part, "history": run.checkpoint.history}
    results["verdict"] = verdict_of(results)
    results["structure"] = run.told
    # 3. The latent, where there is one.
    seen = unseen_posterior = prototypes = None
    if run.store is not None and isinstance(predictor, LatentPredictor):
        seen = posteriors(predictor.amortised, _all_pairs(run.store))
        prototypes = predictor.named
        if subjects.unseen is not None:
            unseen_posterior = posteriors(predictor.amortised, trials[0].context)
        tested = unseen_group if subjects.unseen is not None else seen_group
        results |= _latent(run, predictor, trials, seen_group, tested)
        if subjects.corrupted.any():
            results["corrupted"] = _corrupted(predictor, run.store, subjects.corrupted)
    # 4. What training cost.
    results |= _costs(run)
    probability = torch.cat(scores["own"].probability).tolist()
    return Evaluation(
        results, seen, unseen_posterior, prototypes, names, seen_group, unseen_group, probability
    )


def _described(
    run: Run, settings: EvaluationSettings, subjects: Subjects, names: list[str]
) -> dict[str, Any]:
    """Run, data and protocol of an evaluation, for the report."""
    config, data = run.config, subjects.data
    return {
        "fedvpa": __version__,
        "run": {
            "method": config.method, "preset": config.preset, "seed": config.seed,
            "rounds": run.checkpoint.state.round, "clients": len(run.roster.names),
            "config": config.model_dump(mode="json"),
        },
        "data": {
            "source": data.source, "split": data.split, "unseen_source": settings.unseen,
            "unseen_clients": 0 if subjects.unseen is None else len(subjects.unseen),
            "unseen_pairs": 0 if subjects.unseen is None else int(subjects.unseen.sizes.sum()),
            "held_out_pairs_of_seen_clients": subjects.held_out_pairs,
            "held_out_pairs_by": subjects.dealt,
            "dropped_because_trained_on": subjects.dropped, "skipped": dict(subjects.skipped),
            "notes": subjects.notes, "texts": dict(subjects.texts), "groups": names,
        },
        "protocol": {
            "context": settings.context, "repeats": settings.repeats, "disjoint": True,
            "content": settings.content or config.data.content,
            "training_leaks": config.variational and config.federation.protocol == "single-pair",
            "interval": "95 % over clients: shares by Wilson with Student t, others by Student t",
        },
    }  # fmt: skip


def _latent(
    run: Run, predictor: LatentPredictor, trials: list[Trial], seen_group: Int[Tensor, "k"],
    unseen_group: Int[Tensor, "u"],
) -> dict[str, Any]:  # fmt: skip
    """Diagnostics of the latent preference."""
    assert run.store is not None
    pairs, context = _all_pairs(run.store), trials[0].context
    seen = posteriors(predictor.amortised, pairs)
    unseen = posteriors(predictor.amortised, context)
    prototypes, population = predictor.named, predictor.population
    known = concatenate(context, trials[0].target)
    latent = cluster_diagnostics(seen.mean, seen_group) | {
        "inferred": cluster_diagnostics(posteriors(predictor.posterior, pairs).mean, seen_group),
        "unseen": cluster_diagnostics(unseen.mean, unseen_group),
        "switch_rate": switch_rate(predictor, trials, unseen_group),
        "prototype_cosines": None if prototypes is None else prototype_cosines(prototypes),
        "population_components": None if population is None else population.weight.numel(),
    }
    if population is not None:
        latent["component_confidence"] = component_confidence(
            shares(predictor.responsibilities, context), shares(predictor.responsibilities, known)
        )
    covered = coverage(unseen, posteriors(predictor.amortised, known))
    return {
        "posterior": posterior_diagnostics(seen) | {"coverage_90": covered},
        "leaking_single_pair_accuracy": leaking_accuracy(predictor, trials),
        "latent": latent,
        "prior_weights": _prior_weights(run, seen_group),
    }


def _costs(run: Run) -> dict[str, Any]:
    """Privacy that was spent, and traffic."""
    history, found = run.checkpoint.history, dict[str, Any]()
    if run.config.privacy.enabled and history:
        found["privacy"] = {
            "epsilon": history[-1]["epsilon"],
            "delta": run.config.privacy.delta,
            "unit": "client",
        }
    payload = manifest(run.algorithm, run.checkpoint.state, run.whitener)
    return found | {
        "communication": {
            "down_bytes_per_client_and_round": _bytes_a_round(payload, "down"),
            "up_bytes_per_client_and_round": _bytes_a_round(payload, "up"),
            "manifest": payload,
        }
    }


def _corrupted(
    predictor: LatentPredictor, store: ClientStore, corrupted: Bool[Tensor, "k"]
) -> dict[str, Any]:
    """How the training clients with spoilt labels show: width of their posterior, entropy over the
    components, and how badly the z inferred from their pairs predicts these same pairs (nats a
    pair)."""
    pairs = _all_pairs(store)
    state = adapted(predictor, pairs, torch.full((len(store),), -1))
    signals = {
        "sigma": (0.5 * posteriors(predictor.amortised, pairs).log_var).exp().mean(-1),
        "nll": mean_choice_loss(margins(predictor, state, pairs), pairs.mask.float()),
    }
    if predictor.population is not None:
        share = shares(predictor.responsibilities, pairs)
        signals["mixture_entropy"] = -(share * share.clamp_min(1e-30).log()).sum(-1)
    return {"clients": int(corrupted.sum())} | {
        name: detection(signal, corrupted) for name, signal in signals.items()
    }


def _part(
    predictor: Any,
    trials: list[Trial],
    group: Int[Tensor, "u"],
    names: list[str],
    sizes: Sequence[int],
    seed: int,
) -> tuple[dict[str, Any], dict[str, Scores]]:
    """Controls and the few-shot curve of one set of clients, summarised over clients."""
    scores = evaluate_controls(predictor, trials, group, seed)
    own = scores["own"].accuracy()
    groups = by_group(own, group, names, share)
    present: dict[str, Any] = {k: v for k, v in groups.items() if v["n"]}  # type: ignore[index]
    worst = min(present, key=lambda name: present[name]["mean"]) if present else None
    accuracy: dict[str, Any] = {name: share(s.accuracy()) for name, s in scores.items()}
    accuracy["worst_group"] = {**(present[worst] if worst else share(own)), "group": worst}
    accuracy["by_group"] = present
    few_shot = {}
    for size, at in evaluate_few_shot(predictor, trials, group, sizes).items():
        few_shot[str(size)] = {
            "accuracy": share(at.accuracy()), "nll": interval(at.mean_nll()), "ece": at.ece(),
            "by_group": by_group(at.accuracy(), group, names, share),
        }  # fmt: skip
    return {
        "accuracy": accuracy,
        "nll": {name: interval(s.mean_nll()) for name, s in scores.items()},
        "ece": {name: s.ece() for name, s in scores.items()},
        "few_shot": few_shot,
        "per_client_accuracy": own,
        "per_client_without_context": scores["prior_mean"].accuracy(),
        "by_pair": {
            name: {"accuracy": s.pooled_accuracy(), "nll": s.pooled_nll()}
            for name, s in scores.items()
        },
        "by_overlap": by_overlap(scores),
        "differences": compared_states(scores),
        "targets_scored": int(scores["own"].count.sum()),
    }, scores


def _group_of(roster: Roster, names: list[str]) -> Int[Tensor, "k"]:
    return torch.tensor(
        [-1 if g is None else names.index(g) for g in roster.groups], dtype=torch.long
    )


def _bytes_a_round(payload: list[dict[str, Any]], direction: str) -> int:
    return sum(
        row["bytes"]
        for row in payload
        if row["direction"] == direction and row["when"] == "every round"
    )


def _all_pairs(store: ClientStore) -> PairBatch:
    return store.batch(torch.arange(len(store)))


def _prior_weights(run: Run, group: Int[Tensor, "k"]) -> dict[str, float] | None:
    """How a prior of peers weighs them, where there is one."""
    state, algorithm = run.checkpoint.state, run.algorithm
    if not isinstance(algorithm, FederatedVariational):
        return None
    if not isinstance(algorithm.prior, PeersPrior):
        return None
    prior = algorithm.prior.broadcast(state)
    if prior is None:
        return None
    everyone = torch.arange(len(run.roster.names))
    log_weight = algorithm.prior.mixture_kl.log_weight(
        state.clients.get("prior_logit"), prior, everyone, None
    )
    return prior_weight_diagnostics(log_weight, group[prior.client], group)
