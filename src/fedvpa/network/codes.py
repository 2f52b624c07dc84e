"""Why a client did not answer, as codes: what travels to the server is one of these words.

The reason itself may hold a path, a column's name, or a private text; it stays in the client's log.
"""

from __future__ import annotations

from fedvpa.errors import BadInputError, CheckpointError, RunError
from fedvpa.network.wire import WireError

REASONS = {
    "not-ready": "is still computing its features",
    "not-greeted": "was started anew and has to be greeted first",
    "unread": "could not read the request",
    "unknown-request": "does not know this request",
    "secure-only": "answers this in secure sums alone (secure_only)",
    "not-invited": "is not among the clients that the request names",
    "parts": "refuses a part from outside of fedvpa (parts in its client.yaml)",
    "data": "cannot use its pairs",
    "other-pairs": "holds other pairs than before, or is asked about other parts or features of"
    " them (pairs in its client.yaml)",
    "features": "could not compute its features",
    "replayed": "has trained a later round already: this request was replayed",
    "state": "finds its saved state damaged",
    "disk": "could not save its state",
    "cohort": "refuses a sum over so few clients, or of another kind than it knows",
    "second-sum": "has helped to open another sum of the same numbers",
    "failed": "could not answer",
}
"""Every code, and what the server's log says of the client."""


class RefusedError(RunError):
    """A request is not answered. The server learns `code` and no more; the message is this client's
    own."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code if code in REASONS else "failed"
        super().__init__(message)


def as_code(error: Exception) -> RefusedError:
    """What the server is told of an error."""
    if isinstance(error, RefusedError):
        return error
    codes: tuple[tuple[type[Exception], str], ...] = (
        (WireError, "unread"), (BadInputError, "data"), (CheckpointError, "state"),
        (OSError, "disk"), (RunError, "features"),
    )  # fmt: skip
    code = next((code for kind, code in codes if isinstance(error, kind)), "failed")
    return RefusedError(code, str(error) or type(error).__name__)
