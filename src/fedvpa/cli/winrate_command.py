"""``fedvpa winrate``: judge a policy under each preference, against the base model, the others, and
other policies."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedvpa.cli.policy_commands import parse_weights, posterior_mean
from fedvpa.console import Reporter, emit_json
from fedvpa.errors import BadInputError
from fedvpa.evaluation.statistics import show
from fedvpa.files import write_atomically
from fedvpa.policy.card import PolicyCard, load_card
from fedvpa.policy.policy import Sampling
from fedvpa.policy.prompts import Prompt
from fedvpa.winrate.endpoint import preference_texts
from fedvpa.winrate.judges import Judge, Judging, build_judges
from fedvpa.winrate.report import render_winrate
from fedvpa.winrate.winrate import Setting, winrate


def run_winrate(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Generate, judge, report; 1 where a judge failed."""
    card = load_card(Path(arguments.directory))
    users = {
        name: posterior_mean(file, card) for name, file in _named(arguments.user, "--user").items()
    }
    setting = Setting(
        arguments.prompts, arguments.split, arguments.limit,
        Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.batch),
        arguments.seed,
        [parse_weights(text) for text in arguments.mix], users, _steering(arguments.steering, card),
        _named(arguments.versus, "--versus"), arguments.device, arguments.max_prompt_tokens,
        arguments.trained_prompts == "keep",
    )  # fmt: skip

    def judges_of(prompts: Sequence[Prompt]) -> list[Judge]:
        with reporter.texts("the judge's features") as progress:
            judging = Judging(
                prompts, list(card.preferences), card.selector, arguments.judge_options,
                reporter.say, progress,
            )  # fmt: skip
            return build_judges(arguments.judges, judging)

    with reporter.stages() as on_progress:
        results = winrate(
            arguments.directory,
            arguments.out,
            setting,
            judges_of,
            resume=arguments.resume,
            on_progress=on_progress,
        )
    root = Path(arguments.out)
    write_atomically(root / "winrate.html", render_winrate(results).encode())
    for reason, count in results["prompts_left_out"].items():
        reporter.say(f"prompts left out: {count} x {reason}")
    _show(results, reporter)
    reporter.say(f"{root}/winrate.html, {root}/winrate.json")
    emit_json(arguments.json, results)
    failed = [name for name, found in results["judges"].items() if "error" in found]
    for name in failed:
        reporter.say(
            f"judge '{name}' failed and its figures are missing: {results['judges'][name]['error']}"
        )
    return 1 if failed else 0


def _show(results: dict[str, Any], reporter: Reporter) -> None:
    for name, found in results["judges"].items():
        against = found.get("against_base", {})
        if not against:
            continue
        arms = list(next(iter(against.values())))
        rows = [[arm, *(show(against[c][arm]["win_rate"]) for c in against)] for arm in arms]
        reporter.table(
            f"win rate against the base model, judge: {name} (rows: asked, columns: measured)",
            ["", *against],
            rows,
        )
        if "accuracy" in found:
            shown = ", ".join(
                f"{group} {show(value)}" for group, value in found["accuracy"].items()
            )
            reporter.say(f"accuracy of that judge on prompts it was not trained on: {shown}")
    columns = ["", "words", "at limit", "distinct-2", "repetition-4", "KL per token", "perplexity"]
    rows = [
        [name, f"{t['words']['mean']:.0f}", f"{t['at_limit']:.0%}",
        f"{t['distinct_2']['mean']:.2f}",
         f"{t['repetition_4']['mean']:.3f}", f"{t['kl_per_token']['mean']:.3f}",
         f"{t['perplexity']:.1f}"]
        for name, t in results["texts"].items()
    ]  # fmt: skip
    reporter.table("texts", columns, rows)


def _named(given: list[str], flag: str) -> dict[str, str]:
    out: dict[str, str] = {}
    for text in given:
        name, found, value = text.partition("=")
        if not found or not name or not value or name in out:
            raise BadInputError(f"{flag} {text}: is not NAME=PATH, or is there twice")
        out[name] = value
    return out


def _steering(file: str | None, card: PolicyCard) -> dict[str, str]:
    return {} if file is None else preference_texts(file, list(card.preferences))
