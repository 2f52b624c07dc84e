"""What of a client's answer is believed: names, shapes, types, finiteness, size, and that it
belongs to this round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.federated.bayes.bounded import Bounded
from fedvpa.federated.bayes.joined import parted_slopes
from fedvpa.federated.bayes.models import Models
from fedvpa.federated.exchanges import Layout, update_layout
from fedvpa.federated.messages import Broadcast, Contract
from fedvpa.network.wire import Packet, WireError
from fedvpa.types import Params

LARGEST = 1e6
"""No parameter, latent or loss of a sane client is larger."""
LARGEST_LATENT, MOST_ROUNDING = 1e3, 1e-3
"""No posterior mean of a sane client is larger; shares add up to one but for this."""
MOST_PAIRS = 1e6
TIMES = 20.0
"""So many times the clients' median is plausible."""
ENOUGH_TO_COMPARE, ENOUGH_TO_JUDGE = 3, 4
"""Answers of so many clients can be held against each other; of so many, one that is out of
proportion is its sender's fault."""
PLAUSIBLE_DEVIATIONS = 10.0
"""A latent within so many standard deviations of its prior is plausible, whatever the others'."""


def expected(tensors: Params, shapes: Layout, client: str) -> Params:
    """The tensors, if they are those of `shapes` and sane.

    Raises:
        WireError: naming the client and what is wrong.
    """
    if tensors.keys() != shapes.keys():
        odd = sorted(tensors.keys() ^ shapes.keys())
        raise WireError(
            f"client '{client}': '{odd[0]}' is {'unexpected' if odd[0] in tensors else 'missing'}"
        )
    for name, (shape, dtype) in shapes.items():
        value = tensors[name]
        if tuple(value.shape) != tuple(shape):
            raise WireError(
                f"client '{client}': '{name}' has shape {tuple(value.shape)}, not {tuple(shape)}"
            )
        if value.dtype != dtype:
            raise WireError(f"client '{client}': '{name}' is {value.dtype}, not {dtype}")
        if not value.isfinite().all():
            raise WireError(f"client '{client}': '{name}' holds NaN or Inf")
        # sums over features in float64 are large
        largest = LARGEST if dtype == torch.float32 else 1e12
        if value.numel() and float(value.abs().max()) > largest:
            raise WireError(f"client '{client}': '{name}' holds values beyond {largest:g}")
    return {name: tensors[name] for name in shapes}


def checked_update(
    packet: Packet, broadcast: Broadcast, client: str, contract: Contract, latent: int
) -> Packet:
    """A reply to a training request, if it answers this round and holds what it should.

    Raises:
        WireError: naming the client and what is wrong.
    """
    of_round(packet, broadcast.round, client)
    shapes = update_layout(broadcast, contract, {"d": latent})
    found = expected(packet.tensors, shapes, client)
    for name in ("moments/weight", "labelled"):
        if name in found and not _one_hot(found[name]):
            raise WireError(f"client '{client}': '{name}' is not one client's share")
    moments = {n.partition("/")[2]: v for n, v in found.items() if n.startswith("moments/")}
    if moments:
        sensible("moments", moments, client)
    if contract.size and not 1 <= float(found["size"]) <= MOST_PAIRS:
        raise WireError(f"client '{client}': says it holds {float(found['size']):g} pairs")
    return Packet(packet.header, found)


def checked_slopes(
    packet: Packet, models: Sequence[Models], shapes: Layout, round_number: int, client: str
) -> Packet:
    """The sums of one client for these models, if they answer this round and can be one client's.

    Raises:
        WireError: naming the client and what is wrong.
    """
    of_round(packet, round_number, client)
    found = expected(packet.tensors, shapes, client)
    sensible("slopes", found, client)
    for own in parted_slopes(found, models):
        whole = (own.share.sum(-1) - own.clients).abs() <= MOST_ROUNDING
        near = own.mode.abs() <= LARGEST_LATENT * own.share.unsqueeze(-1) + MOST_ROUNDING
        if not (whole.all() and near.all()):
            raise WireError(f"client '{client}': its shares or latents are not one client's")
    return Packet(packet.header, found)


def checked_bounded(
    packet: Packet, shapes: Layout, round_number: int, clip: float, client: str
) -> Packet:
    """One client's bounded gradients, if they answer this round and are within the bound.

    Raises:
        WireError: naming the client and what is wrong.
    """
    of_round(packet, round_number, client)
    found = expected(packet.tensors, shapes, client)
    within(Bounded(**found).norm, clip, client)
    return Packet(packet.header, found)


def within(norm: Tensor, bound: float, client: str) -> None:
    """Refuse a contribution that is longer than differential privacy presumes.

    Raises:
        WireError: naming the client and both.
    """
    if float(norm) > bound * (1 + MOST_ROUNDING):
        raise WireError(
            f"client '{client}': a contribution of norm {float(norm):g}, beyond {bound:g}"
        )


def of_round(packet: Packet, round_number: int, client: str) -> None:
    """Refuse the answer to another round.

    Raises:
        WireError: naming the client and both rounds.
    """
    if packet.header.get("round") != round_number:
        raise WireError(
            f"client '{client}': answers round {packet.header.get('round')}, but this is round"
            f" {round_number}"
        )


def sensible(kind: str, found: Params, client: str) -> None:
    """Refuse numbers of the right shape that no client could have arrived at.

    Raises:
        WireError: naming the client and what is wrong.
    """
    fine = True
    if kind in ("moments", "clusters"):
        fine = _one_hot(found["weight"]) and _of_one_latent(found)
    elif kind == "scores":
        # log-probabilities, and their products
        total = found["total"]
        fine = bool((total <= 0).all()) and _like(found["outer"], torch.outer(total, total))
        fine = fine and float(found["clients"]) in (0.0, 1.0)
    elif kind in ("outline", "slopes", "judge"):
        fine = _of_one_client(kind, found)
    elif kind == "validate":
        counted, accuracy, nll = (float(found[name]) for name in ("clients", "accuracy", "nll"))
        fine = counted in (0.0, 1.0) and 0 <= accuracy <= counted and nll >= 0
    elif kind == "whitening":
        moment, pairs = found["moment"], float(found["pairs"])
        fine = _like(moment, moment.T) and 1 <= pairs <= MOST_PAIRS
        fine = fine and float(torch.linalg.eigvalsh(moment)[0]) >= -1e-6 * float(moment.trace())
    if not fine:
        raise WireError(
            f"client '{client}': its answer to '{kind}' is not one that a client could have"
        )


def _of_one_client(kind: str, found: Params) -> bool:
    """Whether sums over pairs are those of one client: counts, and what is bounded by them."""
    if kind == "outline":
        pairs, counted = found["pairs"], found["counted"]
        fine = bool(((pairs >= 0) & (pairs <= MOST_PAIRS) & (counted >= 0)).all())
        fine = fine and bool((counted <= pairs).all() and (found["square"] >= 0).all())
        fine = fine and float(found["clients"]) == 1.0 and float(found["several"]) in (0.0, 1.0)
        # Cauchy and Schwarz: a sum is bounded by its squares
        most = pairs.unsqueeze(-1) * found["square"]
        fine = fine and bool((found["total"].square() <= most * (1 + 1e-3) + 1e-3).all())
        return fine and _like(found["cross"], found["cross"].mT)
    if kind == "slopes":
        known, share = found["clients"], found["share"]
        fine = bool(((known == 0) | (known == 1)).all() and (found["loss"] >= 0).all())
        fine = fine and bool(((share >= 0) & (share <= 1 + 1e-5)).all())
        targets = found["targets"]
        return fine and bool(((targets >= 0) & (targets <= MOST_PAIRS)).all())
    n, total, gap = found["pairs"], found["total"], found["gap"]
    fine = 0 <= float(n) <= MOST_PAIRS and float(found["clients"]) == float(n > 0)
    right = found["correct"]
    fine = fine and bool((total <= 0).all() and ((right >= 0) & (right <= n)).all())
    fine = fine and _like(gap - total, (gap - total)[:1].expand_as(total))
    fine = fine and _like(found["squares"], n.square()) and _like(found["cross"], n * gap)
    return fine and _like(found["square"], gap.square())


def _one_hot(weight: Float[Tensor, "*t m"]) -> bool:
    """Whether a client falls to one component of every start."""
    whole = (weight == 0).logical_or(weight == 1).all()
    return bool(whole and (weight.sum(-1) == 1).all())


def _of_one_latent(found: Params) -> bool:
    """Whether shares, their means, squares and variances belong to one latent: nothing outside of
    its component, and the square is that of the mean."""
    share = found["weight"].unsqueeze(-1)
    inside = all((found[n] == found[n] * share).all() for n in ("total", "squared", "variance"))
    square = _like(found["squared"], found["total"].square())
    # the latent is the same, whichever start's component it falls to
    total = found["total"].sum(-2).reshape(-1, found["total"].shape[-1])
    same = _like(total, total[:1].expand_as(total))
    return bool(inside and square and same and (found["variance"] >= 0).all())


def _like(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal but for rounding."""
    return bool(((a - b).abs() <= 1e-5 * b.abs() + 1e-6 * (1 + b.abs().max())).all())


def outlying(kind: str, told: Mapping[int, Params], latent: int) -> dict[int, str]:
    """Which clients' answers are out of all proportion to the others', and why.

    What is compared is positive and of one scale for all clients: the mean square of a feature per
    pair, the size of a latent and of its variance. A client may be `TIMES` as large as the median
    of the clients (the lower one of two). Where half of the clients would be out of proportion, it
    is not known who is: nobody is.
    """
    found: dict[int, str] = {}
    if len(told) < ENOUGH_TO_COMPARE:
        return found
    for what, floor, sizes in _sizes(kind, told, latent):
        median = float(torch.tensor(list(sizes.values()), dtype=torch.float64).median())
        for place, size in sizes.items():
            if size > max(floor, TIMES * median):
                found[place] = f"{what}: {size:.3g}, and {median:.3g} is the clients' median"
    return found if 2 * len(found) < len(told) else {}


def _sizes(
    kind: str, told: Mapping[int, Params], latent: int
) -> Iterator[tuple[str, float, dict[int, float]]]:
    """What of an answer has a size: its name, below which it is always plausible, and the sizes."""
    if kind == "whitening":
        per_pair = {place: 1.0 / float(t["pairs"]) for place, t in told.items()}
        moment = {p: float(t["moment"].trace()) * per_pair[p] for p, t in told.items()}
        yield "second moment per pair", 0.0, moment
        feature = {p: float(t["total"].norm()) * per_pair[p] for p, t in told.items()}
        yield "feature per pair", 0.0, feature
        return
    if kind == "slopes":
        most = {p: t["targets"].amax().clamp_min(1.0) for p, t in told.items()}
        for name in ("weight", "bilinear"):
            steep = {p: float(t[name].norm() / most[p]) for p, t in told.items()}
            yield f"gradient per target ({name})", 1.0, steep
        return
    some = next(iter(told.values()), {})
    # the prior of a latent is the unit normal distribution, which hardly ever is as large as this
    floor = PLAUSIBLE_DEVIATIONS * latent**0.5
    prefix = "moments/" if kind == "train" else ""
    names = {f"{prefix}total": "latent", f"{prefix}variance": "variance of the latent"}
    if f"{prefix}variance" in some:
        for name, title in names.items():
            yield title, floor, {p: _latent_size(t[name]) for p, t in told.items()}
    for name in ("posterior/mean", "mean"):
        if name in some:
            yield "latent", floor, {p: float(t[name].norm()) for p, t in told.items()}


def _latent_size(moment: Float[Tensor, "*t m d"]) -> float:
    """The length of what a client told for the first start; one of its components holds all."""
    return float(moment.reshape(-1, *moment.shape[-2:])[0].sum(0).norm())
