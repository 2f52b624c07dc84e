"""The command line: ``fedvpa data | embed | train | evaluate | compare | personalize | score``, and
for policies ``align | feddpo | generate | chat | export | winrate``; across machines ``federation |
server | client | privacy``.

Exit codes: 0 ok, 1 a run failed or was interrupted, 2 bad usage or bad input.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from fedvpa import __version__
from fedvpa.cli import (
    data_commands,
    federation_commands,
    policy_commands,
    privacy_commands,
    run_commands,
    use_commands,
    winrate_command,
)
from fedvpa.cli.console import Reporter, configure_logging
from fedvpa.errors import BadInputError, FedvpaError

Command = Callable[[argparse.Namespace, Reporter], int]


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="fedvpa",
        description=(
            "Federated variational preference alignment: personalised rewards from private pairwise"
            " preferences."
        ),
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fedvpa {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    ours = (data_commands, run_commands, use_commands, policy_commands, winrate_command)
    modules = (*ours, federation_commands, privacy_commands)
    for module in modules:
        module.register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # the libraries' own bars; ours say what is being done
    os.environ.setdefault("TQDM_DISABLE", "1")
    arguments = build_parser().parse_args(argv)
    reporter = Reporter(arguments.quiet)
    configure_logging(arguments.quiet, arguments.debug)
    run: Command = arguments.run
    try:
        return run(arguments, reporter)
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
        return _fail(
            arguments, "interrupted; a run that had begun can be continued with --resume", 1
        )


def _fail(arguments: argparse.Namespace, message: str, code: int) -> int:
    if arguments.debug:
        import traceback

        traceback.print_exc()
    print(f"fedvpa {arguments.command}: {message}", file=sys.stderr)  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(main())
