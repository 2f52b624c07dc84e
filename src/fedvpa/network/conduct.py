"""Clients that do not keep to the protocol: written down, and left out when they do it again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from fedvpa.errors import CheckpointError
from fedvpa.files import plain_json, write_atomically
from fedvpa.foreign import harmless

STRIKES = 2
"""So many replies that no client of this program sends, and a client is left out."""


@dataclass
class Conduct:
    """What clients have been caught at. `path`: where it outlives the process (None: nowhere)."""

    path: Path | None = None
    caught: dict[str, list[str]] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> Conduct:
        """What is written there.

        Raises:
            CheckpointError: the file is damaged.
        """
        if not path.is_file():
            return Conduct(path)
        try:
            found = json.loads(path.read_text())
            return Conduct(path, {str(name): list(map(str, said)) for name, said in found.items()})
        except (ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{path}: damaged ({error}); mend it, or remove it to let everybody back in"
            ) from error

    def blame(self, name: str, why: str) -> bool:
        """Write down what a client did; whether that is what it is left out for."""
        said = [*self.caught.get(name, []), harmless(why)][-10:]
        self.caught[name] = said
        if self.path is not None:
            write_atomically(self.path, plain_json(self.caught))
        return len(said) == STRIKES

    def is_out(self, name: str) -> bool:
        """Whether a client is left out."""
        return len(self.caught.get(name, [])) >= STRIKES

    @property
    def out(self) -> list[str]:
        """Those who are left out."""
        return [name for name in self.caught if self.is_out(name)]
