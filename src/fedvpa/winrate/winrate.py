"""`fedvpa winrate`: what a policy says under each preference, against the base model, the other
preferences and other policies; judged by whoever is asked to, with intervals over prompts.

Every arm (the base model, a preference, a mix, a user, a system prompt, another policy) answers the
very same prompts, as many of each group of prompts as of any other. A comparison is always of two
arms on one prompt.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from fedvpa.data.personas import ATTRIBUTES, measure
from fedvpa.errors import BadInputError, RunError
from fedvpa.evaluation.statistics import interval
from fedvpa.files import claim, plain_json, write_atomically
from fedvpa.policy.card import WEIGHTS, PolicyCard, load_card
from fedvpa.policy.policy import Policy, Sampling, load_policy
from fedvpa.policy.prompts import Prompt, in_style, read_prompts, trained_prompts, without_trained
from fedvpa.winrate.judges import Judge, JudgeError
from fedvpa.winrate.statistics import (
    difference,
    distinct_n,
    length_controlled,
    monotone,
    repetition,
    win_rate,
)

BASE = "base"
"""The arm of the base model itself."""

OnProgress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Arm:
    """One way to answer: under z of a policy, or as the base model (z None), after a system prompt
    if there is one.

    `asked` is the preference that it is meant to meet.
    """

    name: str
    z: Float[Tensor, "d"] | None = None
    asked: str | None = None
    system: str | None = None
    policy: str | None = None
    """Directory of the policy, where it is not the one that is evaluated."""


class Answer(NamedTuple):
    """A response, whether it ended by itself, its tokens' mean KL to the base model and surprise
    under it (nats)."""

    text: str
    ended: bool
    kl: float
    surprise: float


@dataclass
class Setting:
    """Arms, prompts and sampling of a comparison."""

    prompts: str
    split: str | None = None
    limit: int = 48
    sampling: Sampling = field(default_factory=lambda: Sampling(512, 0.7, 0.95, 32))
    seed: int = 0
    mixes: list[dict[str, float]] = field(default_factory=list)
    users: dict[str, Float[Tensor, "d"]] = field(default_factory=dict)
    """z of users, by the name of the preference that they are expected to have (a name, or
    name:preference)."""
    steering: Mapping[str, str] = field(default_factory=dict)
    """System prompt by preference."""
    versus: Mapping[str, str] = field(default_factory=dict)
    """Other policies: name to directory."""
    device: str = "cpu"
    max_prompt_tokens: int = 0
    """Longer prompts are left out (0: none)."""
    keep_trained: bool = False
    """Keep prompts that one of the policies was trained on."""


def winrate(
    directory: str, out: str, setting: Setting, judges_of: Callable[[Sequence[Prompt]],
    Sequence[Judge]], *,
    resume: bool = False, on_progress: OnProgress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Generate, judge, and return what `winrate.json` holds; a judge that failed has an ``error``
    in place of figures. `judges_of` is told the prompts, so that a judge that is trained can leave
    them out.

    Raises:
        BadInputError: no policy there, names that are not known, no usable prompts, or a directory
            in use.
        RunError: an arm has not answered every prompt.
    """
    began = time.perf_counter()
    root = Path(out)
    policy, card = load_policy(directory, setting.device)
    arms = arms_of(card, setting)
    chosen = read_prompts(
        setting.prompts, setting.split, setting.max_prompt_tokens or 1 << 20, policy.format
    )
    if not setting.keep_trained:
        folders = (directory, *setting.versus.values())
        chosen = without_trained(chosen, set().union(*(trained_prompts(Path(f)) for f in folders)))
    prompts, group = chosen.balanced(setting.limit, setting.seed)
    groups = Counter(group)
    judges = judges_of(prompts)
    asked = _asked(directory, setting, arms, prompts)
    _claim(root, asked, resume)
    answers, speed = _answers(directory, root, policy, arms, prompts, setting, on_progress)
    for name, rows in answers.items():
        if len(rows) != len(prompts) or len(set(groups.values())) != 1:
            raise RunError(
                f"{root}: '{name}' answered {len(rows)} of {len(prompts)} prompts; delete"
                " responses/ and try again"
            )
    results: dict[str, Any] = {
        **asked, "prompt_groups": dict(groups), "prompts_left_out": dict(chosen.skipped),
        "preferences": list(card.preferences),
        "texts": {name: _texts(rows) | {"tokens_per_second": speed[name]} for name,
        rows in answers.items()},
        "judges": {},
    }  # fmt: skip
    if setting.mixes:
        results["mixes"] = _mixes(setting.mixes, answers)
    for judge in judges:
        try:
            results["judges"][judge.name] = _judged(judge, arms, prompts, answers, on_progress)
        except JudgeError as error:
            results["judges"][judge.name] = {"error": str(error), **judge.about()}
    results["samples"] = [
        {
            "prompt": [m._asdict() for m in prompts[i]],
            "responses": {name: rows[i].text for name, rows in answers.items()},
        }
        for i in range(0, len(prompts), max(1, len(prompts) // 8))
    ]
    results["seconds"] = time.perf_counter() - began
    write_atomically(root / "winrate.json", plain_json(results))
    return results


def _answers(
    directory: str, root: Path, policy: Policy, arms: Sequence[Arm], prompts: Sequence[Prompt],
    setting: Setting, on_progress: OnProgress | None,
) -> tuple[dict[str, list[Answer]], dict[str, float]]:  # fmt: skip
    """Every arm's answers, and its tokens per second; those that are in files already are read."""
    answers: dict[str, list[Answer]] = {}
    speed: dict[str, float] = {}
    opened: tuple[str | None, Policy] = (None, policy)
    for number, arm in enumerate(arms):
        file = root / "responses" / f"{number:02d}.jsonl"
        if not file.is_file():
            if arm.policy != opened[0]:
                opened = (arm.policy, load_policy(arm.policy or directory, setting.device)[0])
            found, rate = _answer(opened[1], arm, prompts, setting, on_progress)
            head = {"arm": arm.name, "tokens_per_second": rate}
            lines = [
                json.dumps(head),
                *(json.dumps(a._asdict(), ensure_ascii=False) for a in found),
            ]
            write_atomically(file, ("\n".join(lines) + "\n").encode())
        head, *rows = [json.loads(line) for line in file.read_bytes().split(b"\n") if line]
        answers[arm.name], speed[arm.name] = (
            [Answer(**row) for row in rows],
            head["tokens_per_second"],
        )
    return answers, speed


def arms_of(card: PolicyCard, setting: Setting) -> list[Arm]:
    """Every arm that the setting asks for.

    Raises:
        BadInputError: a preference, or a policy, that is not there, or two arms of one name.
    """
    arms = [Arm(BASE), *(Arm(name, card.z(name), name) for name in card.preferences)]
    arms += [Arm(_mix_name(mix), card.mix(mix)) for mix in setting.mixes]
    for name, z in setting.users.items():
        label, _, asked = name.partition(":")
        card.z(asked or label)
        arms.append(Arm(f"user {label}", z, asked or label))
    for name, system in setting.steering.items():
        card.z(name)
        arms.append(Arm(f"prompted {name}", None, name, system))
    for label, folder in setting.versus.items():
        other = load_card(Path(folder))
        for name in other.preferences:
            known = name if name in card.preferences else None
            arms.append(
                Arm(
                    label if len(other.preferences) == 1 else f"{label} {name}",
                    other.z(name),
                    known,
                    None,
                    folder,
                )
            )
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise BadInputError(
            "two arms have the same name:"
            f" {', '.join(sorted({n for n in names if names.count(n) > 1}))}"
        )
    return arms


def _mix_name(mix: Mapping[str, float]) -> str:
    return ",".join(f"{name}={weight:g}" for name, weight in mix.items())


def _asked(
    directory: str, setting: Setting, arms: Sequence[Arm], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """What the responses depend on: nothing is taken up again after a policy or a prompt has
    changed."""
    digest = hashlib.sha256(json.dumps(prompts).encode())
    for folder in (directory, *setting.versus.values()):
        for file in WEIGHTS:
            digest.update((Path(folder) / file).read_bytes())
    return {
        "policy": directory, "fingerprint": digest.hexdigest()[:16], "prompts": setting.prompts,
        "split": setting.split, "limit": setting.limit, "keep_trained": setting.keep_trained,
        "max_prompt_tokens": setting.max_prompt_tokens, "seed": setting.seed,
        "sampling": {k: v for k, v in vars(setting.sampling).items() if k != "whole"},
        "arms": [{"name": a.name, "asked": a.asked, "system": a.system, "policy": a.policy,
                  "z": None if a.z is None else a.z.tolist()} for a in arms],
    }  # fmt: skip


def _claim(root: Path, asked: dict[str, Any], resume: bool) -> None:
    """Take the directory, or take it up again."""
    file = root / "asked.json"
    if resume and file.is_file():
        if json.loads(file.read_text()) != json.loads(plain_json(asked)):
            raise BadInputError(
                f"{root}: was begun with other settings or another policy; resume it with the same"
                " ones"
            )
    else:
        claim(root, "take its responses up again with --resume, or choose another --out")
    write_atomically(file, plain_json(asked))
    (root / "responses").mkdir(parents=True, exist_ok=True)


def _answer(
    policy: Policy, arm: Arm, prompts: Sequence[Prompt], setting: Setting, report: OnProgress | None
) -> tuple[list[Answer], float]:
    asked = [in_style(p, arm.system) for p in prompts]
    rows = None if arm.z is None else arm.z.expand(len(prompts), -1)
    texts, ended, tokens, began = [""] * len(prompts), [True] * len(prompts), 0, time.perf_counter()
    done = 0
    for batch in policy.sample(asked, rows, setting.sampling, setting.seed):
        for i, text, end in zip(batch.rows, batch.texts, batch.ended):
            texts[i], ended[i] = text, end
        done, tokens = done + len(batch.rows), tokens + batch.tokens
        if report:
            report(
                f"responses: {arm.name}",
                done,
                len(prompts),
                f"{tokens / (time.perf_counter() - began):.0f} tokens/s",
            )
    rate = tokens / (time.perf_counter() - began)
    out = []
    for i, (prompt, text, end) in enumerate(zip(prompts, texts, ended)):
        kl, surprise = policy.divergence(prompt, text, arm.z)
        # of a system prompt it is not computed
        out.append(Answer(text, end, math.nan if arm.system else kl, surprise))
        if report:
            report(f"distance to the base model: {arm.name}", i + 1, len(prompts), "")
    return out, rate


def _texts(rows: Sequence[Answer]) -> dict[str, Any]:
    """What an arm's responses look like, without a judge: means over prompts with intervals."""
    surprise = interval([a.surprise for a in rows])
    return {
        "words": interval([float(len(a.text.split())) for a in rows]),
        "at_limit": sum(not a.ended for a in rows) / len(rows),
        "empty": sum(not a.text for a in rows),
        "distinct_1": interval([distinct_n(a.text, 1) for a in rows]),
        "distinct_2": interval([distinct_n(a.text, 2) for a in rows]),
        "repetition_4": interval([repetition(a.text) for a in rows]),
        "kl_per_token": interval([a.kl for a in rows]),
        "surprise": surprise,
        "perplexity": math.exp(surprise["mean"]) if not math.isnan(surprise["mean"]) else math.nan,
        "measures": {
            name: interval([measure(a.text)[name] for a in rows]) for name, _, _ in ATTRIBUTES
        },
    }


def _mixes(
    mixes: Sequence[Mapping[str, float]], answers: Mapping[str, Sequence[Answer]]
) -> dict[str, Any]:
    """How the exact measures move over the mixes: where all are of the same two preferences,
    from the first alone to the second alone; else in the order they were given."""
    names = [_mix_name(mix) for mix in mixes]
    ends = list(mixes[0])
    if len(ends) == 2 and all(set(mix) == set(ends) for mix in mixes):
        share = {_mix_name(mix): mix[ends[0]] / sum(mix.values()) for mix in mixes} | {
            ends[0]: 1.0,
            ends[1]: 0.0,
        }
        names = sorted(share, key=lambda name: -share[name])
    path = {
        a: [float(np.mean([measure(x.text)[a] for x in answers[n]])) for n in names]
        for a, _, _ in ATTRIBUTES
    }
    return {
        "arms": names,
        "means": path,
        "monotone": {a: monotone(values) for a, values in path.items()},
    }


def _judged(
    judge: Judge, arms: Sequence[Arm], prompts: Sequence[Prompt], answers: Mapping[str,
    Sequence[Answer]],
    report: OnProgress | None,
) -> dict[str, Any]:  # fmt: skip
    """Win rates by criterion: of every arm against the base model; of each preference against what
    else is asked for."""
    texts = {name: [a.text for a in rows] for name, rows in answers.items()}
    words = {name: [len(t.split()) for t in rows] for name, rows in texts.items()}
    own = {a.asked: a.name for a in arms if a.asked == a.name}
    others = [a for a in arms if a.name != BASE]
    jobs = [(c, a.name, BASE) for c in judge.criteria for a in others]
    jobs += [
        (c, own[c], a.name) for c in judge.criteria if c in own for a in others
        if a.name != own[c]
        and (a.name in own.values() or a.asked == c or (a.asked is None and a.policy is not None))
    ]  # fmt: skip
    against: dict[str, dict[str, Any]] = {}
    outcome: dict[tuple[str, str], list[float]] = {}
    head: dict[str, dict[str, Any]] = {}
    for at, (criterion, first, second) in enumerate(jobs):
        result = judge.compare(criterion, prompts, texts[first], texts[second])
        row: dict[str, Any] = {"win_rate": win_rate(result), "ties": sum(r == 0.5 for r in result)}
        if judge.controls_length:
            row["length_controlled"] = length_controlled(result, words[first], words[second])
        if second == BASE:
            outcome[criterion, first] = result
            against.setdefault(criterion, {})[first] = row
        else:
            head.setdefault(criterion, {})[second] = row
        if report:
            report(f"judge: {judge.name}", at + 1, len(jobs), "")
    diagonal = {
        c: {o: difference(outcome[c, own[c]], outcome[c, o]) for o in own.values() if o != own[c]}
        for c in judge.criteria
        if c in own
    }
    clear = [d["low"] > 0 for row in diagonal.values() for d in row.values()]
    return {
        "against_base": against, "own_against": head, "diagonal_minus_other": diagonal,
        "diagonal_dominant": all(clear) if clear else None, **judge.about(),
    }  # fmt: skip
