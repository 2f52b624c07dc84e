"""The command line. `COMMANDS` is the table of all commands; ``fedvpa --help`` reads nothing else.

Exit codes: 0 ok, 1 a run failed or was interrupted, 2 bad usage or bad input.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedvpa import __version__
from fedvpa.errors import BadInputError, FedvpaError


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        help: what it does, in one line.
        flags: where its flags are, as ``module:function`` within `fedvpa.cli.parsers`.
        run: where it is run, as ``module:function`` within `fedvpa.cli`; imported when it is.
        check: what checks the flags before anything else is imported, beside `flags`.
    """

    help: str
    flags: str
    run: str
    check: str = ""


@dataclass(frozen=True)
class Group:
    """Commands under one name."""

    help: str
    commands: Mapping[str, Command]


COMMANDS: dict[str, Command | Group] = {
    "data": Group("look at preference data, or make some", {
        "inspect": Command("counts, lengths, groups, duplicates, leaks",
                           "data:inspect", "data_commands:run_inspect"),
        "convert": Command("write comparisons in one canonical form",
                           "data:convert", "data_commands:run_convert"),
        "personas": Command("write a personas data set with its truth",
                            "data:personas", "data_commands:run_personas"),
    }),
    "embed": Command("compute and cache features ahead of training",
                     "data:embed", "embed_command:run_embed", "check_embed"),
    "train": Command("train one method", "runs:train", "train_command:run_train", "check_train"),
    "evaluate": Command("evaluate a run on seen and unseen clients",
                        "runs:evaluate", "evaluate_command:run_evaluate", "check_evaluate"),
    "compare": Command("methods x settings x seeds, resumable, with paired differences",
                       "runs:compare", "compare_command:run_compare", "check_compare"),
    "personalize": Command("infer a new user's preference, without training",
                           "use:personalize", "use_commands:run_personalize"),
    "preferences": Command("the preferences that a run has found, and what they like",
                           "use:preferences", "use_commands:run_preferences"),
    "score": Command("score responses under a preference", "use:score", "use_commands:run_score"),
    "align": Command("train a policy that a selector's preferences steer",
                     "policies:align", "align_commands:run_align", "check_align"),
    "feddpo": Command("baseline: one policy by federated DPO on the clients' pairs",
                      "policies:feddpo", "align_commands:run_feddpo", "check_feddpo"),
    "generate": Command("responses of a policy under a preference",
                        "policies:generate", "policy_commands:run_generate"),
    "export": Command("write a policy with one preference built in, for plain transformers",
                      "policies:export", "policy_commands:run_export"),
    "chat": Command("talk to a policy under a preference",
                    "policies:chat", "policy_commands:run_chat"),
    "winrate": Command("judge a policy under every preference",
                       "winrate:winrate", "winrate_command:run_winrate", "check_winrate"),
    "serve": Command("serve a policy, or a run's base model, that every user steers",
                     "serving:serve", "serving_commands:run_serve", "check_serve"),
    "keys": Group("keys of a server", {
        "add": Command("make a key; its secret is shown once",
                       "serving:add", "serving_commands:run_add"),
        "list": Command("all keys, without their secrets",
                        "serving:list_", "serving_commands:run_list"),
        "revoke": Command("remove a key", "serving:revoke", "serving_commands:run_revoke"),
    }),
    "federation": Group("make a project for a federation on Flower", {
        "init": Command("settings, certificates, keys, and a folder for each client",
                        "federation:init", "init_command:run_init"),
    }),
    "server": Command("run a federation's server",
                      "federation:server", "federation_commands:run_server_command"),
    "client": Command("run one client of a federation", "federation:client",
                      "federation_commands:run_client_command", "check_client"),
    "privacy": Group("plan differential privacy", {
        "plan": Command("the noise of a round for a target epsilon",
                        "privacy:plan", "privacy_command:run_plan", "check_plan"),
    }),
}  # fmt: skip
"""Every command, in the order of the help."""

ABOUT = (
    "Federated variational preference alignment: personalised rewards from private pairwise"
    " preferences."
)


def build_parser(arguments: Sequence[str], everything: bool = False) -> argparse.ArgumentParser:
    """The command line. Flags are added to the command that is asked for alone, or to all of them
    (`everything`)."""
    parser = argparse.ArgumentParser(prog="fedvpa", description=ABOUT, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fedvpa {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    words = [a for a in arguments if not a.startswith("-")]
    for name, entry in COMMANDS.items():
        own = commands.add_parser(name, help=entry.help, description=entry.help, allow_abbrev=False)
        asked = everything or name in words[:1]
        if isinstance(entry, Command):
            _fill(own, entry, arguments, asked)
            continue
        parts = own.add_subparsers(dest="part", required=True, metavar="|".join(entry.commands))
        for word, command in entry.commands.items():
            inner = parts.add_parser(
                word, help=command.help, description=command.help, allow_abbrev=False
            )
            _fill(inner, command, arguments, asked)
    return parser


def _fill(
    parser: argparse.ArgumentParser, command: Command, arguments: Sequence[str], asked: bool
) -> None:
    parser.set_defaults(entry=command)
    if asked:
        from fedvpa.cli.options import Asked

        _of(f"parsers.{command.flags}")(parser, Asked.of(arguments))


def _of(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(f"fedvpa.cli.{module}"), name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    # the libraries' own bars; ours say what is being done
    for name, value in (("TOKENIZERS_PARALLELISM", "false"), ("TQDM_DISABLE", "1")):
        os.environ.setdefault(name, value)
    given = list(sys.argv[1:] if argv is None else argv)
    if any("." in a and a.startswith("--") for a in given):
        from fedvpa.cli.options import kebab

        given = kebab(given)
    arguments = build_parser(given).parse_args(given)
    try:
        command: Command = arguments.entry
        if command.check:
            _of(f"parsers.{command.flags.partition(':')[0]}:{command.check}")(arguments)
        from fedvpa.console import Reporter, configure_logging

        configure_logging(arguments.quiet, arguments.debug)
        reporter = Reporter(arguments.quiet)
        with reporter.steps():
            code: int = _of(command.run)(arguments, reporter)
        return code
    except BadInputError as error:
        return _fail(arguments, f"error: {error}", 2)
    except FedvpaError as error:
        return _fail(arguments, f"failed: {error}", 1)
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        return _fail(arguments, f"failed: {error}", 1)
    except KeyboardInterrupt:
        serves = arguments.command in ("server", "client", "serve")
        again = (
            "start it again to go on" if serves else "a run that had begun goes on with --resume"
        )
        return _fail(arguments, f"interrupted; {again}", 1)


def _fail(arguments: argparse.Namespace, message: str, code: int) -> int:
    if arguments.debug:
        import traceback

        traceback.print_exc()
    from fedvpa.foreign import harmless

    print(harmless(f"fedvpa {arguments.command}: {message}", 4000), file=sys.stderr)  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(main())
