"""Everything that travels between a client and the server, declared once.

`EXCHANGES` is the table. From it follow the names and shapes of packed messages, the checks of
replies, the scales of secure sums, the payload manifest, and the table in docs/federation.md. A
shape is given by the names of its sizes: d (latent dimensions), m (components or modes), k (peers),
t (starts of a fit), h (width of the features), p (whitened inputs); of models that are searched, n
models of t folds, with o dimensions, u components, v numbers of centres and w widths over all of
them, and s starts of a fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedvpa.federated.messages import PROTOTYPES, Broadcast, Contract
from fedvpa.types import Params


@dataclass(frozen=True)
class Field:
    """One tensor of a message.

    Args:
        name: its name; ``params/*`` stands for every tensor of the section ``params``.
        shape: names of its sizes, as ``m d``; ``*`` fields take the shapes of what they stand for.
        about: what it is.
        dtype: its number type.
        reduce: ``each``: the server reads every client's own; ``sum`` or ``mean``: what it makes of
            all clients'.
        bound: largest magnitude of one client's number in a secure sum, which is rounded to 2^-21
            of it; a client refuses to send more.
        given: the condition under which the field is there ('' for always).
    """

    name: str
    shape: str
    about: str
    dtype: torch.dtype = torch.float32
    reduce: Literal["each", "sum", "mean"] = "sum"
    bound: float = 64.0
    given: str = ""

    @property
    def section(self) -> str:
        """The part of the name before the slash."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Exchange:
    """A request of the server and the clients' reply; `when` says how often."""

    when: str
    request: tuple[Field, ...] = ()
    reply: tuple[Field, ...] = ()

    @property
    def tells_nothing(self) -> bool:
        """Whether the reply holds nothing that depends on a client's pairs."""
        return not self.reply


_WIDE, _INDEX = torch.float64, torch.int64
_PARAMS = Field("params/*", "*", "the shared parameters")
_CENTRES = Field("centre", "t m d", "centres to try")
_POPULATIONS = Field("population*/*", "m d + 2 m", "populations to judge, at most")
EVERY_ROUND, ONCE, FITTED = "every round", "once", "when the population is fitted"


def _moments(shape: str, prefix: str = "", given: str = "", wide: str = "d") -> tuple[Field, ...]:
    wide = f"{shape} {wide}".strip()
    return (
        Field(f"{prefix}weight", shape, "share of each component", bound=1.0, given=given),
        Field(f"{prefix}total", wide, "posterior mean, by component", given=given),
        Field(
            f"{prefix}squared",
            wide,
            "square of the posterior mean, by component",
            bound=256.0,
            given=given,
        ),
        Field(f"{prefix}variance", wide, "posterior variance, by component", given=given),
    )


_BY_PROMPT = Field("by_prompt", "", "whether folds are by prompt, or by response", _INDEX)
_MODELS = (
    Field("fold", "t", "the fold that is kept from each model (-1: none)", _INDEX),
    Field("size", "n 3", "components, dimensions and kind of each model", _INDEX),
    Field("weight", "n t p", "rewards under z = 0"),
    Field("bilinear", "t o p", "effect of z on the rewards"),
    Field("mean", "t v", "centres of the components"),
    Field("variance", "t u", "variances of the components"),
    Field("share", "t u", "weights of the components"),
)

_OPTIONS = Field("options", "n", "number of widths of each model", _INDEX)
_WIDTHS = Field("width", "w 2", "factors on the effect of z, and on the spread of groups")

EXCHANGES: dict[str, Exchange] = {
    "hello": Exchange(ONCE),
    "scale": Exchange(
        ONCE, reply=(Field("scale", "2 h", "logarithms of the features' sizes", _WIDE),)
    ),
    "whitening": Exchange(
        ONCE,
        request=(Field("scale", "2 h", "the features' mean sizes", _WIDE, given="secure"),),
        reply=(
            Field("moment", "h h", "sum over pairs of dh dh^T", _WIDE, bound=4096.0),
            Field("total", "h", "sum over responses of h", _WIDE),
            Field("pairs", "", "number of pairs", _WIDE, bound=4096.0),
        ),
    ),
    "prepare": Exchange(
        ONCE,
        request=(
            Field("centre", "h", "centre of the whitening"),
            Field("projection", "h p", "projection of the whitening"),
        ),
    ),
    "train": Exchange(
        EVERY_ROUND,
        request=(
            _PARAMS,
            Field("prior/mean", "k d", "means of the prior's components", given="prior"),
            Field("prior/log_var", "k d", "log-variances of the prior's components", given="prior"),
            Field("prior/size", "k", "sizes of the prior's components", given="prior"),
            Field(
                "prior/client", "k", "client of each component (-1: none)", _INDEX, given="prior"
            ),
            Field(
                "prior/slot", "k", "place of each component among the peers", _INDEX, given="prior"
            ),
            Field("anchors/mean", "m d", "centres of the anchors", given="anchors"),
            Field("anchors/variance", "m", "variances of the anchors", given="anchors"),
            Field("anchors/weight", "m", "weights of the anchors", given="anchors"),
            Field("price", "m", "prices of the components", given="price"),
            Field("label", "", "the client's own prototype", _INDEX, given="label"),
        ),
        reply=(
            Field("delta/*", "*", "change of a parameter", reduce="mean", bound=4.0),
            Field("loss/*", "", "a term of the loss", reduce="mean", given="losses"),
            Field("posterior/mean", "d", "mean of q(z)", reduce="each", given="posterior"),
            Field(
                "posterior/log_var", "d", "log-variance of q(z)", reduce="each", given="posterior"
            ),
            Field("size", "", "number of pairs", reduce="each", bound=4096.0, given="size"),
            *_moments("m", "moments/", "moments"),
            Field("labelled", "m", "the component chosen", bound=1.0, given="choices"),
        ),
    ),
    "posterior": Exchange(
        FITTED,
        request=(_PARAMS,),
        reply=(
            Field("mean", "d", "mean of q(z) under the present model", reduce="each"),
            Field("log_var", "d", "log-variance of q(z) under the present model", reduce="each"),
        ),
    ),
    "moments": Exchange(FITTED, request=(_PARAMS, _CENTRES), reply=_moments("t m")),
    "scores": Exchange(
        FITTED,
        request=(_PARAMS, _POPULATIONS),
        reply=(
            Field("clients", "", "whether any choice was withheld", _WIDE, bound=1.0),
            Field("total", "t", "log-probability of the withheld choices", _WIDE),
            Field("outer", "t t", "products of these log-probabilities", _WIDE, bound=1024.0),
        ),
    ),
    "outline": Exchange(
        ONCE,
        request=(Field("fold", "t", "the fold that is left out of each sum", _INDEX), _BY_PROMPT),
        reply=(
            Field("pairs", "t", "number of pairs", bound=4096.0),
            Field("total", "t p", "sum over pairs of dh", bound=4096.0),
            Field("counted", "t", "number of pairs, if they can be halved", bound=4096.0),
            Field("halves", "t 2 p", "means of two halves, times that", bound=4096.0),
            Field("cross", "t p p", "product of these means, times that", bound=4096.0),
            Field("square", "t p", "sum over pairs of dh^2", bound=4096.0),
            Field("clients", "", "one", bound=1.0),
            Field("several", "", "whether there are two prompts or more", bound=1.0),
        ),
    ),
    "slopes": Exchange(
        EVERY_ROUND,
        request=(*_MODELS, _BY_PROMPT),
        reply=(
            Field("weight", "n t p", "gradient of the rewards under z = 0", bound=1024.0),
            Field("bilinear", "t o p", "gradient of the effect of z", bound=1024.0),
            Field("targets", "n t", "number of targets", bound=16384.0),
            Field("loss", "n t", "nats of the targets", bound=16384.0),
            Field("share", "t u", "share of each component", bound=1.0),
            Field("mode", "t v", "posterior mean, by component"),
            Field("divergence", "n t", "divergence from the prior", bound=1024.0),
            Field("clients", "n t", "whether any pair is read", bound=1.0),
        ),
    ),
    "clusters": Exchange(
        FITTED,
        request=(*_MODELS, _BY_PROMPT, Field("centre", "s m d", "centres to try")),
        reply=_moments("s m"),
    ),
    "judge": Exchange(
        FITTED,
        request=(
            *_MODELS,
            _BY_PROMPT,
            _OPTIONS,
            _WIDTHS,
            Field("reference", "", "the option that differences are from", _INDEX),
        ),
        reply=(
            Field("clients", "", "whether there are targets", _WIDE, bound=1.0),
            Field("pairs", "", "number of targets", _WIDE, bound=4096.0),
            Field("squares", "", "square of their number", _WIDE, bound=float(1 << 24)),
            Field("total", "w", "log-probability of the targets", _WIDE, bound=4096.0),
            Field("correct", "w", "targets that are right", _WIDE, bound=4096.0),
            Field(
                "gap", "w", "difference from the reference's log-probability", _WIDE, bound=1024.0
            ),
            Field("cross", "w", "this, times the number of targets", _WIDE, bound=float(1 << 22)),
            Field("square", "w", "square of this difference", _WIDE, bound=float(1 << 20)),
        ),
    ),
    "bounded": Exchange(
        EVERY_ROUND,
        request=_MODELS,
        reply=(
            Field("weight", "n t p", "bounded gradient of the rewards under z = 0"),
            Field("bilinear", "t o p", "bounded gradient of the effect of z"),
        ),
    ),
    "gains": Exchange(
        FITTED,
        request=(*_MODELS, _OPTIONS, _WIDTHS),
        reply=(Field("gain", "w", "bounded gain over the first option, nats per target"),),
    ),
    "settle": Exchange(FITTED, request=(_PARAMS, _POPULATIONS)),
    "validate": Exchange(
        "at a validation",
        request=(_PARAMS, _POPULATIONS),
        reply=(
            Field("clients", "", "whether any pair is held out", _WIDE, bound=1.0),
            Field("accuracy", "", "accuracy on the held-out pairs", _WIDE, bound=1.0),
            Field("nll", "", "nats per held-out pair", _WIDE),
        ),
    ),
}
"""Every request by its kind."""


Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and number type by name."""


def layout(fields: tuple[Field, ...], sizes: Mapping[str, int]) -> Layout:
    """Shapes of fields without a ``*``, all of them given."""
    return {f.name: (_shape(f, sizes), f.dtype) for f in fields}


def update_layout(broadcast: Broadcast, contract: Contract, sizes: Mapping[str, int]) -> Layout:
    """Names, shapes and types of what a client answers to a broadcast."""
    sizes = dict(sizes)
    if broadcast.prior is not None:
        sizes["m"] = broadcast.prior.mean.shape[0]
    out: Layout = {}
    given = contract.given(broadcast)
    for f in EXCHANGES["train"].reply:
        if f.given not in given:
            continue
        if f.section == "delta":
            shapes = {n: tuple(v.shape) for n, v in broadcast.trainable.items()}
            out |= {f"delta/{name}": (shape, f.dtype) for name, shape in shapes.items()}
        elif f.section == "loss":
            anchored, orthogonal = broadcast.anchors is not None, PROTOTYPES in broadcast.params
            out |= {f"loss/{name}": ((), f.dtype) for name in loss_terms(anchored, orthogonal)}
        else:
            out[f.name] = (_shape(f, sizes), f.dtype)
    return out


def loss_terms(anchored: bool, orthogonal: bool) -> list[str]:
    """Terms of the loss (M7) in a round with anchors, with orthogonal prototypes, or neither."""
    terms = {"recon": True, "loss": True, "pull": anchored or orthogonal}
    terms |= {"kl": not anchored, "orthonormality": orthogonal}
    return [name for name, there in terms.items() if there]


def field_of(kind: str, name: str) -> Field:
    """The reply's field that a tensor of this name belongs to.

    Raises:
        KeyError: a reply of this kind holds no such field.
    """
    for f in EXCHANGES[kind].reply:
        if f.name == name or (f.name.endswith("/*") and f.section == name.partition("/")[0]):
            return f
    raise KeyError(name)


def may_hold(kind: str, name: str) -> bool:
    """Whether a reply of this kind may hold a tensor of this name."""
    try:
        field_of(kind, name)
    except KeyError:
        return False
    return True


class Payload(NamedTuple):
    """One tensor that travels: its name, shape, bytes, and which way (``down`` to the client,
    ``up`` to the server)."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    direction: str
    when: str = EVERY_ROUND


def payload_rows(
    kinds: Mapping[str, tuple[str, Mapping[str, int]]], given: set[str], like: Mapping[str, Params]
) -> list[Payload]:
    """The manifest of the exchanges that a run makes.

    Args:
        kinds: by kind, when the exchange takes place, and the sizes of its shapes by name.
        given: conditions of fields that hold.
        like: by section, the tensors that a ``*`` field stands for.
    """
    rows = []
    for kind, (when, sizes) in kinds.items():
        exchange = EXCHANGES[kind]
        for direction, fields in (("down", exchange.request), ("up", exchange.reply)):
            for f in fields:
                if f.given and f.given not in given:
                    continue
                if f.section in like:
                    tensors = like[f.section]
                    rows += [
                        Payload(f"{f.section}/{n}", tuple(v.shape), _bytes(v), direction, when)
                        for n, v in tensors.items()
                    ]
                    continue
                shape = _shape(f, sizes)
                count = math.prod(shape) * torch.empty((), dtype=f.dtype).element_size()
                rows.append(Payload(f"{f.name}: {f.about}", shape, count, direction, when))
    return rows


def tensor_payload(params: Params, direction: str, prefix: str = "") -> list[Payload]:
    """A row per tensor."""
    return [
        Payload(prefix + name, tuple(value.shape), _bytes(value), direction)
        for name, value in params.items()
    ]


def exchange_table() -> str:
    """`EXCHANGES` as a Markdown table, for the documentation."""
    lines = [
        "| request | field | shape | type | direction | server reads | bound | if | what |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, exchange in EXCHANGES.items():
        if not (exchange.request or exchange.reply):
            lines.append(f"| `{kind}` | | | | | | | | settings and names, {exchange.when} |")
        for direction, fields in (("down", exchange.request), ("up", exchange.reply)):
            for f in fields:
                kind_of = str(f.dtype).removeprefix("torch.")
                reads = {"each": "each client's"}.get(f.reduce, f"the {f.reduce}")
                up = (reads, f"{f.bound:g}") if direction == "up" else ("", "")
                cells = (f"`{f.name}`", f.shape or "scalar", kind_of, direction, *up, f.given)
                lines.append(f"| `{kind}` | {' | '.join(cells)} | {f.about} |")
    return "\n".join(lines) + "\n"


def _shape(f: Field, sizes: Mapping[str, int]) -> tuple[int, ...]:
    if f.name == _POPULATIONS.name:  # several populations: so many numbers at most
        return (sizes["m"], sizes["d"] + 2)
    return tuple(int(s) if s.isdigit() else sizes[s] for s in f.shape.split())


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()
