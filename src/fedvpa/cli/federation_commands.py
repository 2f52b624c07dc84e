"""``fedvpa federation init``, ``server`` and ``client``: the roles of a federation on Flower."""

from __future__ import annotations

import argparse
import json
import math
import signal
from pathlib import Path
from typing import Any

from fedvpa.cli.console import Reporter, add_common, emit_json
from fedvpa.cli.options import add_settings, settings_given
from fedvpa.config import build_config
from fedvpa.data.preferences import to_record
from fedvpa.errors import BadInputError
from fedvpa.experiment.dataset import training_data


def register(commands: Any) -> None:
    """Add the commands."""
    federation = commands.add_parser(
        "federation", help="make a project for a federation on Flower", allow_abbrev=False
    )
    parts = federation.add_subparsers(dest="part", required=True, metavar="PART")
    init = parts.add_parser(
        "init",
        help="settings, certificates, keys, and a folder for each client",
        allow_abbrev=False,
    )
    init.add_argument("directory", type=Path, metavar="DIR")
    init.add_argument(
        "--client",
        action="append",
        default=[],
        metavar="NAME=PAIRS",
        help="a client and its pairs (repeat)",
    )
    init.add_argument(
        "--trial", action="store_true",
        help="make clients and pairs as `fedvpa train` would, and write each client its pairs",
    )  # fmt: skip
    init.add_argument(
        "--host",
        default="127.0.0.1",
        help="address of the server, as clients reach it (default: 127.0.0.1)",
    )
    init.add_argument("--port", type=int, default=9092, help="its port (default: 9092)")
    init.add_argument(
        "--secure",
        action="store_true",
        help="secure aggregation: the server sees sums over clients alone",
    )
    add_settings(init, skip=("out", "tracker"))
    add_common(init)
    init.set_defaults(run=run_init)

    server = commands.add_parser("server", help="run a federation's server", allow_abbrev=False)
    server.add_argument(
        "directory", type=Path, metavar="DIR", help="what `fedvpa federation init` made"
    )
    server.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the result as JSON"
    )
    add_common(server)
    server.set_defaults(run=run_server_command)

    client = commands.add_parser(
        "client", help="run one client of a federation", allow_abbrev=False
    )
    client.add_argument(
        "directory", type=Path, metavar="DIR", help="the client's folder, with client.yaml in it"
    )
    client.add_argument(
        "--min-cohort",
        type=int,
        default=3,
        help="refuse secure sums over fewer clients (default: 3)",
    )
    client.add_argument(
        "--patience",
        type=float,
        default=math.inf,
        help="give up after so many seconds without a server",
    )
    client.add_argument(
        "--cold", action="store_true", help="let Flower start a process for every message by itself"
    )
    add_common(client)
    client.set_defaults(run=run_client_command)


def run_init(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Write the project."""
    from fedvpa.network.project import init_project
    from fedvpa.network.settings import ServerSettings, training_config

    given = settings_given(arguments)
    pairs: dict[str, str] = {}
    for text in arguments.client:
        name, equals, path = text.partition("=")
        if not equals or not Path(path).exists():
            raise BadInputError(
                f"--client {text}: NAME=PAIRS, where PAIRS is a file or folder that exists"
            )
        if name in pairs:
            raise BadInputError(f"--client {text}: '{name}' is given twice")
        pairs[name] = str(Path(path).resolve())
    if bool(pairs) == arguments.trial:
        raise BadInputError(
            "name the clients with --client NAME=PAIRS (once for each), or let --trial make them"
        )
    trained = {section: value for section, value in given.items() if section != "data"}
    kept = {
        name: value
        for name, value in given.get("data", {}).items()
        if name in ("validation_share", "public")
    }
    # the server reads it, from wherever it is started
    if "public" in kept and Path(kept["public"]).exists():
        kept["public"] = str(Path(kept["public"]).resolve())
    if kept:
        trained["data"] = kept
    names = list(pairs) or ["client"]
    # or it is refused
    training_config(
        ServerSettings(clients=tuple(names), secure=arguments.secure, training=_plain(trained))
    )
    options = {"host": arguments.host, "port": arguments.port, "secure": arguments.secure}
    if arguments.trial:
        whole = build_config(given)
        made = training_data(build_config(given, {"data": {"validation_share": 0.0}}))
        folders = init_project(
            arguments.directory, [c.name for c in made.train], training=_plain(trained), **options
        )
        for folder, client in zip(folders, made.train):
            lines = [json.dumps(to_record(pair), ensure_ascii=False) for pair in client.pairs]
            (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        reporter.say(
            f"{len(folders)} clients from {whole.data.source},"
            f" {sum(len(c.pairs) for c in made.train)} pairs"
        )
    else:
        folders = init_project(
            arguments.directory,
            list(pairs),
            data=list(pairs.values()),
            training=_plain(trained),
            **options,
        )
    reporter.say(f"server: fedvpa server {arguments.directory}")
    for folder in folders[:3]:
        reporter.say(f"client: fedvpa client {folder}   (take the folder to its machine)")
    if len(folders) > 3:
        reporter.say(f"... and {len(folders) - 3} more")
    return 0


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as YAML can hold them, checked and typed."""
    config = build_config(settings).model_dump(mode="json")

    def typed(given: dict[str, Any], checked: dict[str, Any]) -> dict[str, Any]:
        return {
            k: typed(v, checked[k]) if isinstance(v, dict) else checked[k] for k, v in given.items()
        }

    return typed(settings, config)


def run_server_command(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Start the SuperLink and the run; follow it to its end."""
    from fedvpa.network.superlink import run_server

    _stop_on_terminate()
    result = run_server(arguments.directory / "server.yaml")
    reporter.say(
        f"{result['run']}: done; next: fedvpa evaluate {result['run']} --data ... --split ..."
    )
    emit_json(arguments.json, result)
    return 0


def run_client_command(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Serve until interrupted."""
    from fedvpa.network.supernode import run_client

    if arguments.min_cohort < 3:
        raise BadInputError("--min-cohort: at least 3; a sum over two tells each the other's part")
    _stop_on_terminate()
    run_client(
        arguments.directory / "client.yaml",
        arguments.min_cohort,
        arguments.patience,
        arguments.cold,
    )
    return 0


def _stop_on_terminate() -> None:
    """A polite kill ends what was started, as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
