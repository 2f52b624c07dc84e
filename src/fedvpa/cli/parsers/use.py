"""Flags of ``fedvpa personalize`` and ``fedvpa score``."""

from __future__ import annotations

import argparse

from fedvpa.cli.options import Asked, add_common, add_json, add_reading


def personalize(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa personalize``."""
    parser.add_argument("directory", metavar="RUN")
    parser.add_argument("--pairs", required=True, metavar="FILE", help="the user's comparisons")
    add_reading(parser)
    add_json(parser, "z and the rest")
    add_common(parser)


def preferences(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa preferences``."""
    parser.add_argument("directory", metavar="RUN")
    parser.add_argument(
        "--data", metavar="SOURCE", help="pairs to look at (default: those of training)"
    )
    parser.add_argument("--split", help="only files called SPLIT.*")
    add_reading(parser)
    parser.add_argument("--top", type=int, default=3, help="pairs per preference (default: 3)")
    add_json(parser, "them")
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
