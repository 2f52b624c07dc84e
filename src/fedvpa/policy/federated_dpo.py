"""FedDPO, a baseline: one policy for everybody, trained by federated averaging on the clients' own
pairs.

Every round, clients picked at random start from the policy so far, run DPO on their own pairs
against the base model, and send back adapter and conditioner; their mean, weighted by pairs, is the
next policy (McMahan et al., 2017; Rafailov et al., 2023). There is no latent preference: z is the
constant 0, so there is nothing for the conditioner to tell apart.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from fedvpa.data.partition import ClientPairs
from fedvpa.errors import BadInputError
from fedvpa.experiment.dataset import training_data
from fedvpa.experiment.run import RunPaths, load_config
from fedvpa.files import file_name, plain_json, write_atomically
from fedvpa.policy.align import AlignResult, claim
from fedvpa.policy.card import WEIGHTS, PolicyCard
from fedvpa.policy.policy import Policy
from fedvpa.policy.settings import FedDPOConfig
from fedvpa.policy.training import OnStage, load_base, publish, train_dpo


def feddpo(
    run: str,
    out: str,
    config: FedDPOConfig,
    *,
    resume: bool = False,
    on_stage: OnStage | None = None,
) -> AlignResult:
    """Train one policy on the pairs of the clients that the run `run` was trained on. Whole rounds
    are in `OUT/work`.

    Raises:
        BadInputError: no run there, its data are gone, or no pair is short enough; or a directory
            in use.
    """
    began = time.perf_counter()
    report = on_stage or (lambda *_: None)
    root, work = Path(out), Path(out) / "work"
    clients = training_data(load_config(RunPaths(Path(run)))).train
    wanted = {"run": run, "config": config.model_dump(mode="json"), "method": "feddpo"}
    claim(root, wanted, resume)
    loaded = load_base(config)
    policy = Policy(loaded.module, loaded.tokenizer, config.thinking)
    rows = {c.name: _rows(c, policy, config) for c in clients}
    able = [name for name, own in rows.items() if own]
    if not able:
        raise BadInputError(
            f"{run}: no client has a pair within --max-prompt-tokens and --max-response-tokens"
        )
    card = PolicyCard(
        config.base, loaded.revision, config.form, {"shared": []}, [], [], 1.0, run, config.thinking
    )
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(work / "asked.json", plain_json(wanted))
    history: list[dict[str, Any]] = []
    previous: Path | None = None
    for number in range(config.rounds):
        place = work / f"round-{number}"
        if not (place / "mean" / WEIGHTS[1]).is_file():
            generator = np.random.default_rng([config.seed, 29, number])
            cohort = generator.permutation(able)[: config.cohort].tolist()
            _round(number, {n: rows[n] for n in cohort}, card, config, previous, place, report)
        history.append({"round": number} | json.loads((place / "round.json").read_text()))
        previous = place / "mean"
        report("rounds", number + 1, config.rounds, "")
    assert previous is not None
    summary = {**wanted, "clients": len(able), "preferences": ["shared"], "history": history,
               "seconds": time.perf_counter() - began}  # fmt: skip
    write_atomically(root / "align.json", plain_json(summary))
    publish(previous, card, root)
    return AlignResult(root, summary)


def _round(
    number: int, rows: dict[str, list[dict[str, Any]]], card: PolicyCard, config: FedDPOConfig,
    previous: Path | None, place: Path, report: OnStage,
) -> None:  # fmt: skip
    """Train each client of a cohort on its rows, and average what comes out of it."""
    total = sum(map(len, rows.values()))
    found: dict[str, Any] = {"cohort": list(rows), "pairs": total, "loss": 0.0}
    for name, mine in rows.items():
        own = place / "clients" / file_name(name)
        own.mkdir(parents=True, exist_ok=True)
        stage = f"round {number}: {name}"
        _, figures = train_dpo(load_base(config), card, mine, config, previous, own, stage, report)
        found["loss"] += figures["loss"] * len(mine) / total
    write_atomically(place / "round.json", plain_json(found))
    trained = [place / "clients" / file_name(name) / "trained" for name in rows]
    _average(trained, [len(mine) for mine in rows.values()], place / "mean")
    shutil.rmtree(place / "clients")


def _rows(client: ClientPairs, policy: Policy, config: FedDPOConfig) -> list[dict[str, Any]]:
    """A client's first pairs that are short enough, as TRL's rows."""
    out: list[dict[str, Any]] = []
    for pair in client.pairs:
        longest = max(
            len(policy.tokenizer(text)["input_ids"]) for text in (pair.chosen, pair.rejected)
        )
        if len(out) < config.pairs and longest <= config.max_response_tokens:
            if len(policy.prompt_ids(pair.prompt)) > config.max_prompt_tokens:
                continue
            out.append(
                {
                    "prompt": [m._asdict() for m in policy.format.accepted(pair.prompt)],
                    "chosen": [{"role": "assistant", "content": pair.chosen}],
                    "rejected": [{"role": "assistant", "content": pair.rejected}],
                    "preference": [],
                }
            )
    return out


def _average(trained: Sequence[Path], weights: Sequence[int], target: Path) -> None:
    """Mean of the clients' weights; the conditioner is written last, and marks a whole round."""
    (target / "adapter").mkdir(parents=True, exist_ok=True)
    shutil.copy(trained[0] / "adapter/adapter_config.json", target / "adapter/adapter_config.json")
    share = [w / sum(weights) for w in weights]
    for name in WEIGHTS:
        parts = [load_file(folder / name) for folder in trained]
        mean = {key: sum(s * part[key] for s, part in zip(share, parts)) for key in parts[0]}
        save_file(mean, target / f"{name}.part")
        (target / f"{name}.part").replace(target / name)
