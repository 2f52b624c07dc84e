"""Flags of ``fedvpa data`` and ``fedvpa embed``."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedvpa.cli.options import (
    Asked,
    add_common,
    add_json,
    add_reading,
    add_settings,
    seed,
    settings_given,
)
from fedvpa.config import PersonasConfig, build_config, leaf_settings

PUBLISHED = ("prism", "multipref", "community-alignment", "chatbot-arena", "summarize")
"""What ``--from`` takes (`fedvpa.data.published.DATASETS`, which help does not import)."""


def inspect(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa data inspect``."""
    _source(parser)
    parser.add_argument(
        "--test-split", metavar="SPLIT",
        help="also look for pairs and prompts that this split shares",
    )  # fmt: skip
    add_json(parser, "the counts")
    add_common(parser)


def convert(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa data convert``."""
    _source(parser)
    parser.add_argument(
        "--from", dest="published", choices=PUBLISHED, metavar="{" + ",".join(PUBLISHED) + "}",
        help="a published data set, as it is published (default: comparisons as for --data)",
    )  # fmt: skip
    parser.add_argument(
        "--to", choices=["trl", "hh"], default="trl",
        help="trl: prompt, chosen, rejected as messages; hh: transcripts (default: trl)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="a new .jsonl or .jsonl.gz file"
    )
    add_common(parser)


def _source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="file, folder, zip archive, or hf:// and a Hub dataset")
    parser.add_argument("--split", help="only files called SPLIT.*")
    add_reading(parser)


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
    parser.add_argument("--seed", type=seed, default=0, help="seed of users and pairs (default: 0)")
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
