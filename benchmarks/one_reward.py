"""What is said of people who do not differ: labels drawn from one reward, and everybody's.

    python -m benchmarks.one_reward DIR [--clients 40] [--seeds 0,1,2] [--json FILE]

DIR holds the folders of HH-RLHF, one per group. A logistic regression on all training pairs,
whoever labelled them, is the one reward; every label of training and test is drawn anew from its
probabilities (so that nothing of the groups is left but their prompts), and `fedvpa-gp` is trained
and scored as on real labels. The verdict should be that users do not differ measurably, with own
z's loss within 0.002 nats of the shared reward's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from fedvpa import evaluate, train
from fedvpa.config import build_config
from fedvpa.data.reading import read_pairs
from fedvpa.features.cache import FeatureCache
from fedvpa.federated.random import stream
from fedvpa.records import PreferencePair

PENALTY = 1e-3
"""L2 penalty of the one reward, per pair, on features of unit variance."""


def main(argv: list[str] | None = None) -> int:
    """Train and score with every seed, and print a row each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", metavar="DIR")
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("runs/one_reward"))
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args(argv)
    rows = []
    for seed in (int(s) for s in arguments.seeds.split(",")):
        rows.append({"seed": seed} | run(arguments.data, arguments.clients, seed, arguments.out))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def run(data: str, clients: int, seed: int, out: Path) -> dict[str, Any]:
    """Own z against the shared reward that was trained beside, on labels of one reward."""
    sides = [read_pairs(data, split).pairs for split in ("train", "test")]
    fitted, asked = relabelled(sides, seed)
    place = out / f"seed{seed}"
    result = train(fitted, place, seed=seed, clients=clients, validation_share=0.0)
    found = evaluate(result, asked).results
    seen = found["seen"]
    return {
        "structure": {k: v for k, v in found["structure"].items() if k != "judged"},
        "own": seen["by_pair"]["own"], "shared": seen["by_pair"]["shared"],
        "verdict": {who: told["sentence"] for who, told in found["verdict"].items()},
    }  # fmt: skip


def relabelled(sides: Sequence[Sequence[PreferencePair]], seed: int) -> list[list[PreferencePair]]:
    """The pairs with labels drawn from one reward, fitted to the first side's."""
    cache = FeatureCache(build_config({}).features)
    each = [cache.pairs(list(side)).values.numpy() for side in sides]
    differences = [values[:, 0] - values[:, 1] for values in each]
    scale = differences[0].std(0) + 1e-6
    x = np.concatenate([differences[0], -differences[0]]) / scale
    y = np.repeat([1, 0], len(differences[0]))
    model = LogisticRegression(fit_intercept=False, C=1 / (PENALTY * len(x)), max_iter=500).fit(
        x, y
    )
    out = []
    for number, (side, difference) in enumerate(zip(sides, differences)):
        draw = stream(seed, "labels", number)
        kept = model.predict_proba(difference / scale)[:, 1]
        uniform = np.random.default_rng(draw.initial_seed() % (1 << 63)).random(len(side))
        out.append([
            pair if keep else replace(pair, chosen=pair.rejected, rejected=pair.chosen)
            for pair, keep in zip(side, uniform < kept)
        ])  # fmt: skip
    return out


if __name__ == "__main__":
    sys.exit(main())
