"""``fedvpa federation init``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedvpa.cli.options import settings_given
from fedvpa.cli.parsers.federation import CLIENTS_OWN
from fedvpa.config import build_config
from fedvpa.console import Reporter
from fedvpa.data.memory import write_pairs
from fedvpa.errors import BadInputError
from fedvpa.experiment.dataset import training_data
from fedvpa.methods import DEFAULT
from fedvpa.network.project import init_project
from fedvpa.network.settings import ServerSettings, training_config


def run_init(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Write the project."""
    given = settings_given(arguments)
    given = {"method": DEFAULT} | given
    pairs = _named_pairs(arguments.client)
    if bool(pairs) == arguments.trial:
        raise BadInputError(
            "name the clients with --client NAME=PAIRS (once for each), or let --trial make them"
        )
    trained = _for_training(given)
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
            write_pairs(client.pairs, folder / "pairs.jsonl", private=True)
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


def _named_pairs(clients: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in clients:
        name, equals, path = text.partition("=")
        if not equals or not Path(path).exists():
            raise BadInputError(
                f"--client {text}: NAME=PAIRS, where PAIRS is a file or folder that exists"
            )
        if name in pairs:
            raise BadInputError(f"--client {text}: '{name}' is given twice")
        pairs[name] = str(Path(path).resolve())
    return pairs


def _for_training(given: dict[str, Any]) -> dict[str, Any]:
    """The settings that go to the clients: of those of data, what does not make a trial's pairs."""
    trained = {section: value for section, value in given.items() if section != "data"}
    kept = {k: v for k, v in given.get("data", {}).items() if f"data.{k}" in CLIENTS_OWN}
    # the server reads it, from wherever it is started
    if "public" in kept and Path(kept["public"]).exists():
        kept["public"] = str(Path(kept["public"]).resolve())
    return trained | {"data": kept} if kept else trained


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as YAML can hold them, checked and typed."""
    config = build_config(settings).model_dump(mode="json")

    def typed(given: dict[str, Any], checked: dict[str, Any]) -> dict[str, Any]:
        return {
            k: typed(v, checked[k]) if isinstance(v, dict) else checked[k] for k, v in given.items()
        }

    return typed(settings, config)
