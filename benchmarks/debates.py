"""Whether a preference of real people holds on debates that they, and everybody, were not asked
about: parameters and contexts from one half of the debates of `convarg`, targets from the other.

    python -m benchmarks.debates DIR [--splits 0,1,2] [--seed 0] [--rounds 50] [--json FILE]

DIR holds `convarg`. The debates (a prompt up to "Argue for") are sorted, shuffled with the number
of the split and halved, and both halves are the fitting one in turn. Nothing is given: `fedvpa-gp`
searches its structure inside the fitting half. Two shared rewards stand beside: the one that is
trained with it (the best penalty of the same inputs), and `fedavg-btl` on the same inputs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedvpa.config import Config, build_config
from fedvpa.data.partition import ClientPairs
from fedvpa.data.reading import read_pairs
from fedvpa.evaluation.protocol import Scores, Trial, adapted, given_trial, margins
from fedvpa.experiment.build import build_method
from fedvpa.experiment.dataset import to_store
from fedvpa.features.cache import FeatureCache
from fedvpa.features.whitening import Whitener
from fedvpa.federated.batch import ClientStore
from fedvpa.records import PreferencePair

SIDE = "Argue for"


def main(argv: list[str] | None = None) -> int:
    """Run the halves and print a row each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, metavar="DIR")
    parser.add_argument("--splits", default="0,1,2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args(argv)
    pairs = read_pairs(str(arguments.data / "convarg"), "train").pairs
    debates = sorted({debate(p) for p in pairs})
    rows = []
    for split in (int(s) for s in arguments.splits.split(",")):
        order = list(debates)
        random.Random(split).shuffle(order)
        halves = [set(order[: len(order) // 2]), set(order[len(order) // 2 :])]
        for half in (0, 1):
            row = {"split": split, "half": half}
            row |= run(pairs, halves[half], halves[1 - half], arguments.seed, arguments.rounds)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def debate(pair: PreferencePair) -> str:
    """What is argued about."""
    return pair.prompt[-1].content.partition(SIDE)[0].strip()


def run(
    pairs: list[PreferencePair], fitted: set[str], asked: set[str], seed: int, rounds: int
) -> dict[str, Any]:
    """Train on the fitted debates, and score the asked ones; those with pairs in both count."""
    given = {"seed": seed, "data": {"source": "convarg"}, "federation": {"cohort": 0,
             "rounds": rounds}}  # fmt: skip
    config = build_config(given, {"method": "fedvpa-gp"})
    names = sorted({p.client_id or "" for p in pairs})
    sides = [
        [ClientPairs(n, None, tuple(p for p in pairs if p.client_id == n and debate(p) in half))
         for n in names]
        for half in (fitted, asked)
    ]  # fmt: skip
    kept = [i for i in range(len(names)) if all(len(side[i].pairs) > 1 for side in sides)]
    context, target = stores([[side[i] for i in kept] for side in sides], config)
    trial, nobody = given_trial(context, target), torch.full((len(kept),), -1)
    # 1. Own z, the prior's, another user's, and the shared reward beside.
    algorithm, clients = build_method(config, context)
    state = algorithm.init(context.roster)
    for _ in range(rounds):
        state, _ = algorithm.apply(state, clients, range(len(context)))
    state = algorithm.finalise(state, clients)
    predictor: Any = algorithm.predictor(state)
    own = adapted(predictor, trial.context, nobody)
    other = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))]
    found = {
        "own": scored(margins(predictor, own, trial.target), trial),
        "prior_mean": scored(margins(predictor, predictor.neutral(len(own)), trial.target), trial),
        "another": scored(margins(predictor, other, trial.target), trial),
        "shared": scored(predictor.shared_margin(trial.target), trial),
    }
    # 2. A shared reward by local steps, on the same inputs.
    shared = build_config(
        given, {"method": "fedavg-btl", "model": {"scaling": "principal", "inputs": 128}}
    )
    method, others = build_method(shared, context)
    reached = method.init(context.roster)
    for _ in range(rounds):
        reached, _ = method.apply(reached, others, range(len(context)))
    btl = method.predictor(reached)
    found["fedavg_btl"] = scored(btl.margin(btl.neutral(len(own)), trial.target), trial)
    told: Any = algorithm
    structure = {k: v for k, v in told.told(state).items() if k != "judged"}
    return {"workers": len(kept), "pairs": int(trial.mask.sum()), "structure": structure} | found


def stores(sides: list[list[ClientPairs]], config: Config) -> list[ClientStore]:
    """Both halves' pairs in the coordinates of the first."""
    cache = FeatureCache(config.features)
    tables = [
        cache.pairs([p for c in side for p in c.pairs]).values.split([len(c.pairs) for c in side])
        for side in sides
    ]
    whitener = Whitener.fit(torch.cat(list(tables[0])), config.model.inputs, config.model.white)
    return [to_store(side, list(t), whitener, False) for side, t in zip(sides, tables)]


def scored(margin: Tensor, trial: Trial) -> Mapping[str, float]:
    """Accuracy and nats, by pair and by client."""
    scores = Scores.empty(len(margin))
    scores.add(margin, trial.mask)
    return {
        "nll": scores.pooled_nll(), "accuracy": scores.pooled_accuracy(),
        "nll_by_client": float((scores.nll / scores.count).mean()),
        "accuracy_by_client": float((scores.correct / scores.count).mean()),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
