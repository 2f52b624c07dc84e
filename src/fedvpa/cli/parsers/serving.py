"""Flags of ``fedvpa serve`` and ``fedvpa keys``."""

from __future__ import annotations

import argparse

from fedvpa.cli.options import Asked, add_common, add_flat_settings, add_json, flat_settings_given
from fedvpa.errors import BadInputError
from fedvpa.serving.settings import SCOPES, ServingSettings


def serve(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa serve``."""
    parser.add_argument("directory", metavar="DIR", help="a policy's folder, or a run's")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes, each with the model (default: 1)"
    )
    add_flat_settings(parser, ServingSettings, skip=("directory",))
    add_common(parser)


def check_serve(arguments: argparse.Namespace) -> None:
    """What can be known before anything is loaded."""
    arguments.built = flat_settings_given(arguments, ServingSettings)
    if arguments.workers < 1:
        raise BadInputError("--workers: at least 1")
    if arguments.workers > 1 and arguments.built.port == 0:
        raise BadInputError("--port: several --workers need a port that is given")


def add(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa keys add``."""
    _store(parser)
    parser.add_argument("--scope", choices=SCOPES, required=True, help="what the key may do")
    parser.add_argument("--user", default=None, metavar="ID", help="its user (scope user)")
    add_json(parser, "the key")
    add_common(parser)


def list_(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa keys list``."""
    _store(parser)
    add_json(parser, "the keys")
    add_common(parser)


def revoke(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa keys revoke``."""
    parser.add_argument("key", metavar="KEY", help="its id, as `fedvpa keys list` shows it")
    _store(parser)
    add_common(parser)


def _store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", required=True, metavar="URL",
        help="database of the server, as sqlite:///users.db or postgresql://USER@HOST/NAME",
    )  # fmt: skip
