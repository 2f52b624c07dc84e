"""Flags of ``fedvpa align``, ``feddpo``, ``generate``, ``export`` and ``chat``."""

from __future__ import annotations

import argparse
from typing import Any

from fedvpa.cli.options import (
    Asked,
    add_common,
    add_flat_settings,
    add_json,
    flat_settings_given,
    seed,
)
from fedvpa.policy.settings import AlignConfig, FedDPOConfig, TrainingConfig


def align(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa align``."""
    parser.add_argument(
        "directory", metavar="RUN", help="a trained run with prototypes (fedvpa-gp)"
    )
    parser.add_argument(
        "--prompts", required=True, metavar="SOURCE",
        help="public: personas, .txt, .jsonl, or preference pairs",
    )  # fmt: skip
    parser.add_argument("--split", help="only files called SPLIT.*")
    _training(parser, AlignConfig)


def check_align(arguments: argparse.Namespace) -> None:
    """Settings that cannot be used are refused before anything is loaded."""
    arguments.built = flat_settings_given(arguments, AlignConfig)


def feddpo(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa feddpo``."""
    parser.add_argument("directory", metavar="RUN", help="a run whose clients and pairs are used")
    _training(parser, FedDPOConfig)


def check_feddpo(arguments: argparse.Namespace) -> None:
    """Settings that cannot be used are refused before anything is loaded."""
    arguments.built = flat_settings_given(arguments, FedDPOConfig)


def generate(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa generate``."""
    parser.add_argument("directory", metavar="DIR", help="what `fedvpa align` made")
    parser.add_argument(
        "--prompts", required=True, metavar="SOURCE",
        help="personas, .txt, .jsonl, or preference pairs",
    )  # fmt: skip
    parser.add_argument("--split", help="only files called SPLIT.*")
    parser.add_argument(
        "--limit", type=int, default=0,
        help="at most this many prompts, picked at random (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--responses", required=True, metavar="FILE", help="jsonl to write: prompt and response"
    )
    _sampling(parser)
    add_common(parser)


def export(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa export``."""
    parser.add_argument("directory", metavar="DIR", help="what `fedvpa align` made")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument(
        "--format", choices=["merged", "peft", "all"], default="merged",
        help="a whole model, a PEFT adapter, or both for every named preference (default: merged)",
    )  # fmt: skip
    _preference(parser)
    add_common(parser)


def chat(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa chat``."""
    parser.add_argument("directory", metavar="DIR", help="what `fedvpa align` made")
    _sampling(parser)
    add_common(parser)


def _training(parser: argparse.ArgumentParser, config: type[TrainingConfig]) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="where the policy goes")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    add_flat_settings(parser, config)
    add_json(parser, "the summary")
    add_common(parser)


def _sampling(parser: argparse.ArgumentParser) -> None:
    which = _preference(parser)
    which.add_argument("--off", action="store_true", help="the base model itself")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="tokens per response (default: 128)"
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="0: greedy (default: 0.7)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus (default: 0.95)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the draws (default: 0)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")


def _preference(parser: argparse.ArgumentParser) -> Any:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--prefer", metavar="NAME", help="a named preference, or neutral")
    which.add_argument("--mix", metavar="A=0.3,B=0.7", help="a weighted mean of named preferences")
    which.add_argument(
        "--user", metavar="FILE", help="comparisons of a user, whose z the selector infers"
    )
    which.add_argument("--z", metavar="FILE", help="z as `fedvpa personalize --json` writes it")
    return which
