"""The payload manifest of a variational method: every tensor that travels between a client and the
server, and its size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedvpa.federated.algorithm import Payload, tensor_payload
from fedvpa.federated.components import ITERATIONS, RESTARTS
from fedvpa.federated.population import MAX_MODES
from fedvpa.types import ServerState

if TYPE_CHECKING:
    from fedvpa.federated.variational import FederatedVariational


def payload_rows(a: FederatedVariational, state: ServerState) -> list[Payload]:
    """All that travels; a client's pairs, features, prior logits and optimiser state do not."""
    d, m = a.selector.encoder.latent, a.modes or MAX_MODES
    rows = tensor_payload(state.params, "down")
    numbers = 3 * m * d + 2 * m  # of one set of moments and its prices
    if a.schedule.prior == "peers":
        k = min(a.max_components, len(a.participants))
        rows.append(
            Payload(
                "prior: peers' means, log-variances, sizes, ids",
                (k, 2 * d + 2),
                k * (8 * d + 12),
                "down",
            )
        )
    if a.by_sums and not a.schedule.anchored:
        rows.append(
            Payload(
                "prior: components' means, log-variances; prices",
                (m, 2 * d + 1),
                4 * m * (2 * d + 1),
                "down",
            )
        )
        rows.append(
            Payload("moments of the own latent; component chosen", (numbers,), 4 * numbers, "up")
        )
    if a.schedule.orthogonal and not a.by_sums:
        rows.append(Payload("label", (), 8, "down"))
    if a.schedule.anchored and state.population:
        rows += tensor_payload(state.population, "down", "anchors.")
    rows += tensor_payload(a.shared(state.params), "up", "delta.")
    if a.privacy is None:
        rows.append(Payload("loss and its terms, at most", (5,), 20, "up"))
    if a.sends_posterior:
        rows.append(Payload("posterior: mean, log-variance", (2, d), 8 * d, "up"))
    if a.counted:
        rows.append(Payload("number of pairs", (), 4, "up"))
    return rows + _once(a, d, m)


def _once(a: FederatedVariational, d: int, m: int) -> list[Payload]:
    """What travels when the population is fitted."""
    once = "when the population is fitted"
    rows = []
    if a.by_sums:
        starts = RESTARTS * (1 if a.modes is not None else MAX_MODES - 1)
        size = 4 * starts * m * d
        rows.append(
            Payload(
                "centres to try", (starts, m, d), size, "down", f"{ITERATIONS + 2} exchanges {once}"
            )
        )
        shape = (starts, m, 3 * d + 1)
        rows.append(
            Payload(
                "moments under them",
                shape,
                3 * size + size // d,
                "up",
                f"{ITERATIONS + 2} exchanges {once}",
            )
        )
    else:
        rows.append(
            Payload(
                "posterior under the present model", (2, d), 8 * d, "up", f"{once}, and at the end"
            )
        )
    if a.schedule.anchored and a.modes is None:
        tried = sum(range(2, MAX_MODES + 1))  # components of all populations
        rows.append(
            Payload(
                "populations to choose from, at most",
                (tried, d + 2),
                4 * tried * (d + 2),
                "down",
                once,
            )
        )
        answers = (MAX_MODES - 1, MAX_MODES)
        rows.append(
            Payload(
                "log-probabilities of withheld choices",
                answers,
                8 * MAX_MODES * (MAX_MODES - 1),
                "up",
                once,
            )
        )
    return rows
