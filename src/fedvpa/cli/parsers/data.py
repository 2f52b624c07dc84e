"""Flags of ``fedvpa data inspect``, ``fedvpa data personas`` and ``fedvpa embed``."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedvpa.cli.options import Asked, add_common, add_json, add_settings, settings_given
from fedvpa.config import PersonasConfig, build_config, leaf_settings


def inspect(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa data inspect``."""
    parser.add_argument("source", help="file, folder, or Hub dataset")
    parser.add_argument("--split", help="only files called SPLIT.*")
    parser.add_argument(
        "--test-split", metavar="SPLIT",
        help="also look for pairs and prompts that this split shares",
    )  # fmt: skip
    parser.add_argument("--on-bad-record", choices=["few", "error", "skip"], default="few")
    add_json(parser, "the counts")
    add_common(parser)


def personas(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa data personas``."""
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a directory that is new or empty"
    )
    parser.add_argument(
        "--users", type=int, default=40, help="users in train.jsonl and test.jsonl (default: 40)"
    )
    parser.add_argument(
        "--unseen-users", type=int, default=10, help="users of unseen.jsonl (default: 10)"
    )
    for name, info in PersonasConfig.model_fields.items():
        text = f"{info.description} (default: {info.default})"
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text)
    parser.add_argument("--seed", type=int, default=0, help="seed of users and pairs (default: 0)")
    add_common(parser)


def embed(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa embed``: what decides which texts there are, and how they are read."""
    shown = [n for n in leaf_settings() if n.startswith(("data.", "features.")) or n == "seed"]
    add_settings(parser, asked, shown, skip=("out", "method", "preset", "tracker"))
    add_json(parser, "what was computed")
    add_common(parser)


def check_embed(arguments: argparse.Namespace) -> None:
    """Settings that cannot be used are refused before anything is loaded."""
    arguments.built = build_config(settings_given(arguments))
