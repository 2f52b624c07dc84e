"""``fedvpa winrate``: judge a policy under each preference, against the base model, the others, and
other policies."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedvpa.cli.console import Reporter, add_common, emit_json, show_interval
from fedvpa.cli.policy_commands import parse_weights, posterior_mean
from fedvpa.config import FeaturesConfig, read_yaml
from fedvpa.errors import BadInputError
from fedvpa.experiment.use import untrained_pairs
from fedvpa.files import write_atomically
from fedvpa.policy.policy import PolicyCard, Sampling, load_card
from fedvpa.policy.prompts import Prompt
from fedvpa.winrate.judges import POLES, EndpointJudge, ExactJudge, Judge, RewardJudge
from fedvpa.winrate.report import render_winrate
from fedvpa.winrate.winrate import Setting, winrate


def register(commands: Any) -> None:
    """Add the command."""
    one = commands.add_parser(
        "winrate", help="judge a policy under every preference", allow_abbrev=False
    )
    one.add_argument("directory", metavar="DIR", help="what `fedvpa align` made")
    one.add_argument(
        "--prompts",
        required=True,
        metavar="SOURCE",
        help="personas, .txt, .jsonl, or pairs; none trained on",
    )
    one.add_argument("--split", help="only files called SPLIT.*")
    one.add_argument(
        "--limit", type=int, default=48, help="prompts, as many of each group (0: all; default: 48)"
    )
    one.add_argument(
        "--max-prompt-tokens",
        type=int,
        default=0,
        help="leave longer prompts out (0: none; default: 0)",
    )
    one.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="winrate.json, winrate.html and all responses go there",
    )
    one.add_argument(
        "--resume",
        action="store_true",
        help="take up responses that are there already, or add a judge",
    )
    arms = one.add_argument_group("what else answers, beside the base model and every preference")
    arms.add_argument(
        "--mix",
        action="append",
        default=[],
        metavar="A=0.3,B=0.7",
        help="a mix; give several, in their order",
    )
    arms.add_argument(
        "--user", action="append", default=[], metavar="NAME[:PREFERENCE]=FILE",
        help="a user's comparisons, and the preference that they are expected to have",
    )  # fmt: skip
    arms.add_argument(
        "--steering",
        metavar="FILE",
        help="YAML of preference: system prompt (prompt-only steering)",
    )
    arms.add_argument(
        "--versus", action="append", default=[], metavar="NAME=DIR", help="another policy"
    )
    judges = one.add_argument_group("judges")
    judges.add_argument(
        "--exact",
        action="store_true",
        help="exact measures, for preferences that are persona attributes",
    )
    judges.add_argument(
        "--judge-pairs", metavar="SOURCE", help="train a reward model per group on these pairs"
    )
    judges.add_argument("--judge-split", metavar="SPLIT", help="only files called SPLIT.*")
    judges.add_argument(
        "--judge-backbone",
        default="minilm",
        help="its features; not the selector's (default: minilm)",
    )
    judges.add_argument(
        "--judge-layer", type=int, default=0, help="of that backbone (default: the middle)"
    )
    judges.add_argument(
        "--judge-url", metavar="URL", help="an OpenAI-compatible endpoint, as https://host/v1"
    )
    judges.add_argument("--judge-model", metavar="NAME", help="the model to ask there")
    judges.add_argument(
        "--judge-criteria", metavar="FILE", help="YAML of preference: what it rewards, in words"
    )
    judges.add_argument(
        "--judge-key-env", default="OPENAI_API_KEY", metavar="VARIABLE", help="holds the key"
    )
    judges.add_argument(
        "--judge-price",
        metavar="IN,OUT",
        help="price of a million tokens read and written, to state the cost",
    )
    sampling = one.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=512)
    sampling.add_argument("--temperature", type=float, default=0.7, help="0: greedy (default: 0.7)")
    sampling.add_argument("--top-p", type=float, default=0.95)
    sampling.add_argument("--batch", type=int, default=32)
    sampling.add_argument("--seed", type=int, default=0)
    sampling.add_argument("--device", default="cpu")
    one.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the results as JSON"
    )
    add_common(one)
    one.set_defaults(run=run_winrate)


def run_winrate(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Generate, judge, report; 1 where a judge failed."""
    card = load_card(Path(arguments.directory))
    if not (arguments.exact or arguments.judge_pairs or arguments.judge_url):
        raise BadInputError(
            "no judge: give --exact, --judge-pairs SOURCE, or --judge-url URL with --judge-model"
            " NAME"
        )
    if (
        not 0 < arguments.top_p <= 1
        or arguments.temperature < 0
        or arguments.max_new_tokens < 1
        or arguments.batch < 1
    ):
        raise BadInputError(
            "--top-p is above 0 and at most 1, --temperature at least 0, --max-new-tokens and"
            " --batch at least 1"
        )
    if arguments.limit < 0 or arguments.max_prompt_tokens < 0:
        raise BadInputError("--limit and --max-prompt-tokens: at least 0")
    users = {
        name: posterior_mean(file, card) for name, file in _named(arguments.user, "--user").items()
    }
    setting = Setting(
        arguments.prompts, arguments.split, arguments.limit,
        Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.batch),
        arguments.seed,
        [parse_weights(text) for text in arguments.mix], users, _texts(arguments.steering, card),
        _named(arguments.versus, "--versus"), arguments.device, arguments.max_prompt_tokens,
    )  # fmt: skip

    def judges_of(prompts: Sequence[Prompt]) -> list[Judge]:
        return _judges(arguments, card, prompts, reporter)

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
        rows = [
            [arm, *(show_interval(against[c][arm]["win_rate"]) for c in against)] for arm in arms
        ]
        reporter.table(
            f"win rate against the base model, judge: {name} (rows: asked, columns: measured)",
            ["", *against],
            rows,
        )
        if "accuracy" in found:
            shown = ", ".join(
                f"{group} {show_interval(value)}" for group, value in found["accuracy"].items()
            )
            reporter.say(f"accuracy of that judge on prompts it was not trained on: {shown}")
    columns = ["", "words", "at limit", "distinct-2", "repetition-4", "KL a token", "perplexity"]
    rows = [
        [name, f"{t['words']['mean']:.0f}", f"{t['at_limit']:.0%}",
        f"{t['distinct_2']['mean']:.2f}",
         f"{t['repetition_4']['mean']:.3f}", f"{t['kl_per_token']['mean']:.3f}",
         f"{t['perplexity']:.1f}"]
        for name, t in results["texts"].items()
    ]  # fmt: skip
    reporter.table("texts", columns, rows)


def _judges(
    arguments: argparse.Namespace, card: PolicyCard, prompts: Sequence[Prompt], reporter: Reporter
) -> list[Judge]:
    judges: list[Judge] = []
    if arguments.exact:
        poles = [name for name in card.preferences if name in POLES]
        if not poles:
            raise BadInputError(
                f"--exact: none of {', '.join(card.preferences)} is a persona attribute"
                f" ({', '.join(POLES)})"
            )
        judges.append(ExactJudge(poles))
    if arguments.judge_pairs:
        pairs, dropped = untrained_pairs(
            card.selector, arguments.judge_pairs, arguments.judge_split, arguments.judge_backbone
        )
        if dropped:
            reporter.say(
                f"{dropped} of --judge-pairs were left out: the selector was trained on them"
            )
        judged = set(prompts)
        kept = [pair for pair in pairs if pair.prompt not in judged]
        if len(kept) < len(pairs):
            reporter.say(
                f"{len(pairs) - len(kept)} of --judge-pairs were left out: they are on prompts that"
                " are judged"
            )
        with reporter.texts("the judge's features") as progress:
            features = FeaturesConfig(
                backbone=arguments.judge_backbone, layer=arguments.judge_layer
            )
            judges.append(RewardJudge(kept, features, progress))
    if arguments.judge_url:
        if not arguments.judge_model:
            raise BadInputError("--judge-url: name the model to ask with --judge-model")
        described = _texts(arguments.judge_criteria, card)
        criteria = described or {
            n: f"the reply that fits the preference '{n}' better" for n in card.preferences
        }
        price = _price(arguments.judge_price)
        judges.append(
            EndpointJudge(
                arguments.judge_url,
                arguments.judge_model,
                criteria,
                arguments.judge_key_env,
                price=price,
            )
        )
    return judges


def _named(given: list[str], flag: str) -> dict[str, str]:
    out: dict[str, str] = {}
    for text in given:
        name, found, value = text.partition("=")
        if not found or not name or not value or name in out:
            raise BadInputError(f"{flag} {text}: is not NAME=PATH, or is there twice")
        out[name] = value
    return out


def _texts(file: str | None, card: PolicyCard) -> dict[str, str]:
    """Preference to text, from YAML."""
    if file is None:
        return {}
    content = read_yaml(Path(file))
    for name, text in content.items():
        card.z(name)
        if not isinstance(text, str) or not text.strip():
            raise BadInputError(f"{file}: '{name}' needs a text")
    return {name: text.strip() for name, text in content.items()}


def _price(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        read, written = (float(part) for part in text.split(","))
    except ValueError as error:
        raise BadInputError(f"--judge-price {text}: is not IN,OUT, as in 0.15,0.6") from error
    return read, written
