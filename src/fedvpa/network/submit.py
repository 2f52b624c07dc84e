"""Several commands of Flower's command line in one process, which takes two seconds to start;
they are read as JSON."""

from __future__ import annotations

import json
import sys


def main() -> int:
    """Run the commands in their order, up to the first that fails."""
    from flwr.cli.app import app

    for command in json.load(sys.stdin):
        try:
            code = app(command, standalone_mode=False)
        except SystemExit as ended:
            code = ended.code
        except Exception as error:  # what click raises for a usage error has no common, public base
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            code = 1
        if code:
            sys.stderr.write(f"`flwr {' '.join(command[:2])}` failed\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
