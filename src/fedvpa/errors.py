"""One exception tree. Every message says what was wrong, where, and what to do.

The command line maps it to exit codes: `BadInputError` and its children end with 2, every other
`FedvpaError` with 1.
"""

from __future__ import annotations


class FedvpaError(Exception):
    """Base class of everything fedvpa raises on purpose."""


class BadInputError(FedvpaError):
    """The user's input cannot be used: a file, a record, a setting or a combination of settings."""


class RecordError(BadInputError):
    """A preference record is unusable. `where` is ``file:line``, `reason` a fixed phrase, `advice`
    what to do."""

    def __init__(self, where: str, reason: str, advice: str = "") -> None:
        self.where, self.reason, self.advice = where, reason, advice
        super().__init__(f"{where}: {reason}" + (f" ({advice})" if advice else ""))


class UnusableRecordError(RecordError):
    """A well-formed record that compares nothing (an empty reply, two identical ones, a turn of a
    tool), as every annotated data set has a few."""


class TieError(UnusableRecordError):
    """A comparison that was made, and ended without a preference: however many there are, they are
    no fault of the data."""


class RunError(FedvpaError):
    """A run failed although its input was well-formed."""


class NonFiniteUpdateError(RunError):
    """A client produced NaN or Inf; the message names the client and the round."""


class CheckpointError(RunError):
    """A checkpoint is missing, damaged, or belongs to another configuration."""
