"""Flags of ``fedvpa winrate``."""

from __future__ import annotations

import argparse
import math

from fedvpa.cli.options import Asked, add_common, add_json, seed
from fedvpa.errors import BadInputError
from fedvpa.parts import JUDGES, part

OPTIONS = ("pairs", "split", "backbone", "layer", "url", "model", "criteria", "key_env", "price")
"""Options of the built-in judges: each is the flag ``--judge-...``."""
IMPLIED = {"exact": "exact", "judge_pairs": "reward", "judge_url": "endpoint"}
"""Flags that ask for a judge by themselves."""


def winrate(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa winrate``."""
    parser.add_argument("directory", metavar="DIR", help="what `fedvpa align` made")
    parser.add_argument(
        "--prompts", required=True, metavar="SOURCE", help="personas, .txt, .jsonl, or pairs"
    )
    parser.add_argument(
        "--trained-prompts", choices=["leave-out", "keep"], default="leave-out",
        help="prompts that a policy was trained on (default: leave-out)",
    )  # fmt: skip
    parser.add_argument("--split", help="only files called SPLIT.*")
    parser.add_argument(
        "--limit", type=int, default=48, help="prompts, as many of each group (0: all; default: 48)"
    )
    parser.add_argument(
        "--max-prompt-tokens",
        type=int,
        default=0,
        help="leave longer prompts out (0: none; default: 0)",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="winrate.json, winrate.html and all responses go there",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="take up responses that are there already, or add a judge",
    )
    _arms(parser)
    _judges(parser)
    _sampling(parser)
    add_json(parser, "the results")
    add_common(parser)


def _arms(parser: argparse.ArgumentParser) -> None:
    arms = parser.add_argument_group(
        "what else answers, beside the base model and every preference"
    )
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


def _judges(parser: argparse.ArgumentParser) -> None:
    judges = parser.add_argument_group("judges")
    judges.add_argument(
        "--judge", action="append", default=[], metavar="NAME",
        help=f"{', '.join(JUDGES)}, or package.module:NAME; several are asked in their order",
    )  # fmt: skip
    judges.add_argument(
        "--judge-option", action="append", default=[], metavar="KEY=VALUE",
        help="an option of a judge from elsewhere",
    )  # fmt: skip
    judges.add_argument(
        "--exact",
        action="store_true",
        help="--judge exact: exact measures, for preferences that are persona attributes",
    )
    judges.add_argument(
        "--judge-pairs",
        metavar="SOURCE",
        help="--judge reward: train a reward model per group on these pairs",
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
        "--judge-url",
        metavar="URL",
        help="--judge endpoint: an OpenAI-compatible endpoint, as https://host/v1",
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


def _sampling(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-new-tokens", type=int, default=512, help="tokens per response (default: 512)"
    )
    sampling.add_argument("--temperature", type=float, default=0.7, help="0: greedy (default: 0.7)")
    sampling.add_argument("--top-p", type=float, default=0.95, help="nucleus (default: 0.95)")
    sampling.add_argument(
        "--batch", type=int, default=32, help="prompts side by side (default: 32)"
    )
    sampling.add_argument("--seed", type=seed, default=0, help="seed of the draws (default: 0)")
    sampling.add_argument("--device", default="cpu", help="torch device (default: cpu)")


def check_winrate(arguments: argparse.Namespace) -> None:
    """Judges and numbers that cannot be are refused before anything is loaded; what judges are
    told is collected."""
    names = list(arguments.judge)
    names += [judge for flag, judge in IMPLIED.items() if getattr(arguments, flag)]
    arguments.judges = list(dict.fromkeys(names))
    if not arguments.judges:
        raise BadInputError(
            "no judge: give --exact, --judge-pairs SOURCE, or --judge-url URL with --judge-model"
            " NAME"
        )
    for name in arguments.judges:
        part("judge", JUDGES, name)
    given = {name: getattr(arguments, f"judge_{name}") for name in OPTIONS}
    options = {name.replace("_", "-"): str(v) for name, v in given.items() if v is not None}
    for text in arguments.judge_option:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise BadInputError(f"--judge-option {text}: is not KEY=VALUE")
        options[key] = value
    arguments.judge_options = options
    if (
        not 0 < arguments.top_p <= 1
        or not 0 <= arguments.temperature < math.inf
        or arguments.max_new_tokens < 1
        or arguments.batch < 1
    ):
        raise BadInputError(
            "--top-p is above 0 and at most 1, --temperature at least 0, --max-new-tokens and"
            " --batch at least 1"
        )
    if arguments.limit < 0 or arguments.max_prompt_tokens < 0:
        raise BadInputError("--limit and --max-prompt-tokens: at least 0")
