"""Flags of ``fedvpa personalize`` and ``fedvpa score``."""

from __future__ import annotations

import argparse

from fedvpa.cli.options import Asked, add_common, add_json


def personalize(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa personalize``."""
    parser.add_argument("directory", metavar="RUN")
    parser.add_argument("--pairs", required=True, metavar="FILE", help="the user's comparisons")
    parser.add_argument("--on-bad-record", choices=["few", "error", "skip"], default="few")
    add_json(parser, "z and the rest")
    add_common(parser)


def score(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa score``."""
    parser.add_argument("directory", metavar="RUN")
    parser.add_argument(
        "--z", required=True,
        help="FILE written by `personalize --json FILE`, or prototype:K, or mean (nothing known)",
    )  # fmt: skip
    parser.add_argument(
        "--responses", required=True, metavar="FILE",
        help='jsonl: {"prompt": ..., "response": ...} per line; prompt as in pairs',
    )  # fmt: skip
    add_json(parser, "the scores")
    add_common(parser)
