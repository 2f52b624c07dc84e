"""Flags of ``fedvpa federation init``, ``fedvpa server`` and ``fedvpa client``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from fedvpa.cli.options import Asked, add_common, add_json, add_settings
from fedvpa.config import settings_readable
from fedvpa.errors import BadInputError
from fedvpa.methods import method

CLIENTS_OWN = ("data.validation_share", "data.public")
"""Of the data settings, those that clients take from the server; the rest makes a trial's pairs."""

COMPONENTS = {"prior": {"kind": "components"}}
"""The prior of a federation, unless another is asked for: nobody's latent is shown to anybody."""


def init(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa federation init``."""
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--client", action="append", default=[], metavar="NAME=PAIRS",
        help="a client and its pairs (repeat)",
    )  # fmt: skip
    parser.add_argument(
        "--trial", action="store_true",
        help="make clients and pairs as `fedvpa train` would, and write each client its pairs",
    )  # fmt: skip
    parser.add_argument(
        "--host", default="127.0.0.1",
        help="address of the server, as clients reach it (default: 127.0.0.1)",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=9092, help="its port (default: 9092)")
    parser.add_argument(
        "--secure", action="store_true",
        help="secure aggregation: the server sees sums over clients alone",
    )  # fmt: skip
    trial = set() if asked.everything else {"data.split", "data.partition"}
    simulated = {"federation.backend", "federation.chunk", "federation.workers"}
    shown = settings_readable(asked.method) - trial - simulated
    entry = method(asked.method)
    prior = COMPONENTS if entry.latent and not entry.summed else {}
    given = {"method": asked.method} | prior
    add_settings(parser, asked, shown, skip=("out", "tracker"), given=given)
    add_common(parser)


def server(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa server``."""
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="what `fedvpa federation init` made"
    )
    add_json(parser, "the result")
    add_common(parser)


def client(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """``fedvpa client``."""
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="the client's folder, with client.yaml in it"
    )
    parser.add_argument(
        "--min-cohort", type=int, default=3,
        help="refuse secure sums over fewer clients (default: 3)",
    )  # fmt: skip
    parser.add_argument(
        "--patience", type=float, default=math.inf,
        help="give up after so many seconds without a server (default: never)",
    )  # fmt: skip
    add_common(parser)


def check_client(arguments: argparse.Namespace) -> None:
    """A number out of range is refused before anything is loaded."""
    if arguments.min_cohort < 3:
        raise BadInputError("--min-cohort: at least 3; a sum over two tells each the other's part")
