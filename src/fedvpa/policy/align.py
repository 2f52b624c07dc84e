"""Stage 2 on the server: sample from the policy, let the selector choose under every preference,
train with DPO; repeat.

No client's data are read: prompts are public, and preferences are the selector's prototypes.
Everything that took time is in `OUT/work` as soon as it is known (candidates batch by batch,
reference log-probabilities, TRL's checkpoints), so an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa import files
from fedvpa.errors import BadInputError, RunError
from fedvpa.experiment.preferences import named_preferences
from fedvpa.experiment.selectors import Selector, open_selector
from fedvpa.features.loading import LoadedModel
from fedvpa.files import plain_json, write_atomically
from fedvpa.policy.card import PolicyCard
from fedvpa.policy.policy import Policy, Sampling
from fedvpa.policy.prompts import Prompt, in_style, read_prompts, read_styles, save_trained_prompts
from fedvpa.policy.settings import AlignConfig
from fedvpa.policy.training import OnStage, by_prompt, load_base, publish, train_dpo
from fedvpa.records import Item

logger = logging.getLogger("fedvpa")


class Candidate(NamedTuple):
    """A sampled response, and whether it ended by itself rather than at the limit."""

    text: str
    ended: bool


@dataclass(frozen=True)
class AlignResult:
    """Where the policy is, and how it came about (also `align.json` there)."""

    root: Path
    summary: dict[str, Any]


def align(
    run: str, prompts: str, out: str, config: AlignConfig, *, split: str | None = None,
    resume: bool = False,
    on_stage: OnStage | None = None,
) -> AlignResult:  # fmt: skip
    """Train a policy that the selector in `run` and its z steer.

    Raises:
        BadInputError: no run with a selector, no usable prompts, a base model that cannot be had,
            or a directory in use.
        RunError: the selector told no two responses apart (every pair fell under the margin).
    """
    start = time.perf_counter()
    report = on_stage or (lambda *_: None)
    root, work = Path(out), Path(out) / "work"
    selector = open_selector(run)
    preferences = named_preferences(selector)
    logger.info("preferences: %s", ", ".join(preferences))
    styles = read_styles(config.styles) if config.styles else []
    wanted = {
        "run": str(run),
        "prompts": prompts,
        "split": split,
        "config": config.model_dump(mode="json"),
        "styles": styles,
    }
    claim(root, wanted, resume)
    loaded = load_base(config)
    base = Policy(loaded.module, loaded.tokenizer, config.thinking)
    chosen = read_prompts(prompts, split, config.max_prompt_tokens, base.format, to_train=True)
    # the selector reads them in the form that the base model does
    used = [base.format.accepted(p) for p in chosen.some(config.limit, config.seed)]
    centre, scale = _centre_and_scale(torch.stack(list(preferences.values())), selector.neutral)
    card = PolicyCard(
        config.base, loaded.revision, config.form,
        {name: z.tolist() for name, z in preferences.items()}, selector.neutral.tolist(),
        centre.tolist(), scale, str(run), config.thinking,
        selector.run.identity,
    )  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(work / "asked.json", plain_json(wanted))
    summary: dict[str, Any] = {
        **wanted, "prompts_used": len(used), "prompts_skipped": dict(chosen.skipped),
        "preferences": list(preferences),
        "iterations": [],
    }  # fmt: skip
    conditions = {name: z.expand(len(used), -1) for name, z in preferences.items()}
    conditions |= users_by_prompt(selector, config.users, len(used), config.seed)
    job = _Job(selector, used, conditions, config, styles, card, work, report)
    previous = _iterations(job, loaded, base, summary["iterations"])
    summary["seconds"] = time.perf_counter() - start
    write_atomically(root / "align.json", plain_json(summary))
    save_trained_prompts(root, used)
    publish(previous, card, root)
    return AlignResult(root, summary)


class _Job(NamedTuple):
    """Inputs of every iteration of an alignment."""

    selector: Selector
    prompts: list[Prompt]
    conditions: dict[str, Float[Tensor, "n d"]]
    config: AlignConfig
    styles: list[str]
    card: PolicyCard
    work: Path
    report: OnStage


def _iterations(job: _Job, loaded: LoadedModel, base: Policy, rows: list[dict[str, Any]]) -> Path:
    """Sample, choose, train, as often as asked; figures go to `rows`. Returns the last weights'
    place."""
    config, policy, previous = job.config, base, None
    for iteration in range(config.iterations):
        place = job.work / f"iteration-{iteration}"
        place.mkdir(exist_ok=True)
        candidates = _candidates(
            policy, job.prompts, job.conditions, config, job.styles, iteration, place, job.report
        )
        pairs, counts = choose(
            job.selector, job.prompts, candidates, job.conditions, config.margin,
            config.pairs_per_prompt, config.choose_from == "ended",
        )  # fmt: skip
        if not pairs:
            raise RunError(
                f"the selector told no two responses apart by {config.margin}; lower --margin, or"
                " train it longer"
            )
        stage, ordered = f"training, iteration {iteration}", by_prompt(pairs, config.seed)
        model, figures = train_dpo(
            loaded, job.card, ordered, config, previous, place, stage, job.report
        )
        rows.append(counts | figures)
        policy, previous = Policy(model, loaded.tokenizer, config.thinking), place / "trained"
        # TRL wraps a bare model; the adapter comes back with its weights
        if iteration + 1 < config.iterations:
            loaded = load_base(config)
    assert previous is not None
    return previous


def users_by_prompt(
    selector: Selector, users: int, prompts: int, seed: int
) -> dict[str, Float[Tensor, "p d"]]:
    """Posterior means of training clients, drawn anew for every prompt: so z between and around the
    prototypes is trained too.

    Raises:
        BadInputError: users were asked for, but the selector knows no posteriors.
    """
    if not users:
        return {}
    means = selector.posterior_means
    if means is None:
        raise BadInputError(
            f"--users: {selector.run.paths.root} holds no posteriors of its clients"
        )
    generator = torch.Generator().manual_seed(seed)
    return {
        f"user-{u}": means[torch.randint(len(means), (prompts,), generator=generator)]
        for u in range(users)
    }


def choose(
    selector: Selector, prompts: Sequence[Prompt], candidates: dict[str, list[list[Candidate]]],
    preferences: dict[str, Float[Tensor, "p d"]], margin: float, per_prompt: int = 1,
    ended_only: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """Best and worst of each prompt's candidates under each preference (a z for every prompt),
    second best and second worst, and so on up to `per_prompt` pairs; returns TRL rows with their z,
    and counts.

    Pairs whose rewards differ by less than `margin`, and prompts with fewer than two different
    candidates, are dropped. With `ended_only`, what the limit cut off may be rejected but not
    chosen.
    """
    rows: list[dict[str, Any]] = []
    close = same = 0
    by_preference: dict[str, int] = {}
    for name, z in preferences.items():
        lists = [
            list({one.text: one for one in drawn if one.text}.values())
            for drawn in candidates[name]
        ]
        items = [
            Item(prompt, one.text) for prompt, different in zip(prompts, lists) for one in different
        ]
        counts = torch.tensor([len(different) for different in lists])
        rewards = (
            selector.score(items, z.repeat_interleave(counts, 0)).split(counts.tolist())
            if items
            else []
        )
        for prompt, different, reward, own in zip(prompts, lists, rewards, z):
            if len(different) < 2:
                same += 1
                continue
            order = reward.argsort(descending=True).tolist()
            good = [i for i in order if different[i].ended] if ended_only else order
            for high, low in list(zip(good, reversed(order)))[: min(per_prompt, len(order) // 2)]:
                if float(reward[high] - reward[low]) < max(margin, 1e-9):
                    close += 1
                    continue
                best, worst = different[high], different[low]
                by_preference[name] = by_preference.get(name, 0) + 1
                rows.append(
                    {
                        "prompt": [{"role": m.role, "content": m.content} for m in prompt],
                        "chosen": [{"role": "assistant", "content": best.text}],
                        "rejected": [{"role": "assistant", "content": worst.text}],
                        "chosen_ended": best.ended,
                        "rejected_ended": worst.ended,
                        "preference": own.tolist(),
                    }
                )
    return rows, {
        "pairs": by_preference,
        "dropped_under_margin": close,
        "dropped_without_two_responses": same,
    }


def _centre_and_scale(z: Float[Tensor, "m d"], neutral: Float[Tensor, "d"]) -> tuple[Tensor, float]:
    """Preferences are measured from the population's mean, in units of their root-mean-square
    distance from it."""
    return neutral, max(float((z - neutral).square().sum(-1).mean().sqrt()), 1e-6)


def _candidates(
    policy: Policy, prompts: Sequence[Prompt], preferences: dict[str, Float[Tensor, "p d"]],
    config: AlignConfig,
    styles: Sequence[str], iteration: int, place: Path, report: OnStage,
) -> dict[str, list[list[Candidate]]]:  # fmt: skip
    """Responses by preference and prompt. The first iteration draws from the base model, for all
    preferences alike: without a system prompt of ours, and under each style in turn."""
    sampling = Sampling(
        config.max_new_tokens, config.temperature, config.top_p, config.sample_batch, whole=True
    )
    conditions: dict[str, Tensor | None] = {"": None} if iteration == 0 else dict(preferences)
    drawn: dict[str, list[list[Candidate]]] = {}
    turns: list[str | None] = [None, *(styles if iteration == 0 else [])]
    jobs = [
        in_style(prompt, turns[c % len(turns)])
        for prompt in prompts
        for c in range(config.candidates)
    ]
    block = max(1, config.sample_batch // config.candidates) * config.candidates  # whole prompts
    for c, (name, z) in enumerate(conditions.items()):
        file = place / f"candidates{'-' + str(c) if name else ''}.jsonl"
        found = _read_lines(file)
        tokens, began = 0, time.perf_counter()
        with file.open("a", encoding="utf-8") as stream:
            for at in range(len(found), len(jobs), block):
                part = jobs[at : at + block]
                rows = (
                    None
                    if z is None
                    else z.repeat_interleave(config.candidates, 0)[at : at + block]
                )
                fresh = [Candidate("", True)] * len(part)
                seed = (config.seed * 1009 + iteration) * 1009 + c * 101 + at
                for batch in policy.sample(part, rows, sampling, seed):
                    tokens += batch.tokens
                    for i, text, ended in zip(batch.rows, batch.texts, batch.ended):
                        fresh[i] = Candidate(text, ended)
                stream.write("".join(json.dumps(one._asdict()) + "\n" for one in fresh))
                stream.flush()
                found += fresh
                speed = tokens / (time.perf_counter() - began)
                report(
                    f"candidates{' ' + name if name else ''}",
                    len(found),
                    len(jobs),
                    f"{speed:.0f} tokens/s",
                )
        n = config.candidates
        drawn[name] = [found[i * n : (i + 1) * n] for i in range(len(prompts))]
    return {name: drawn.get(name, drawn.get("", [])) for name in preferences}


def _read_lines(file: Path) -> list[Candidate]:
    """Candidates that were drawn before; a last line that was cut off is dropped, from the file
    too."""
    if not file.is_file():
        return []
    whole = file.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if kept != whole:
        write_atomically(file, kept)
    return [Candidate(**json.loads(line)) for line in kept.split(b"\n") if line]


def claim(root: Path, wanted: dict[str, Any], resume: bool) -> None:
    """Check that a run may write to `root`: a new directory, or with `resume` one that was begun
    with the same wishes.

    Raises:
        BadInputError: it is in use, holds nothing to resume, or was begun otherwise.
    """
    asked = root / "work" / "asked.json"
    if resume:
        if not asked.is_file():
            raise BadInputError(f"{root}: nothing to resume there (no work/asked.json)")
        if json.loads(asked.read_text()) != wanted:
            raise BadInputError(
                f"{root}: was begun with other settings, prompts or selector; resume it with the"
                " same ones"
            )
    else:
        files.claim(root, "continue an interrupted run with --resume, or choose another --out")
