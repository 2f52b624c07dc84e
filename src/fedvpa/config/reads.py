"""Which settings per run reads: those of its method, and those of every part that is chosen.

A choice is a setting whose value decides what else is read. "Set but would not be read", the flags
that a command's help shows, and the settings that several methods share all follow from here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedvpa.config.sections import Config
from fedvpa.methods import EVERY, METHODS, Method, entry_of
from fedvpa.parts import AGGREGATORS, HEADS, PRIORS, SOURCES, Table, is_reference, part

Reads = tuple[str, ...]

BASIC = (
    "method", "seed", "out", "data.source", "data.split", "data.clients", "data.partition",
    "data.personas.groups", "data.personas.pairs", "features.backbone", "features.layer",
    "features.device", "model.inputs", "model.latent", "model.conditioning", "prior.kind",
    "prototypes.kind", "prototypes.modes", "federation.rounds", "federation.cohort",
    "federation.local_steps", "federation.learning_rate", "federation.aggregation",
    "privacy.enabled", "privacy.noise", "privacy.clip",
)  # fmt: skip
"""Settings that ``--help`` shows; ``--help-all`` shows the rest too."""
PARTS: dict[str, tuple[str, Table]] = {
    "prior.kind": ("prior", PRIORS),
    "model.conditioning": ("reward head", HEADS),
    "federation.aggregator": ("aggregator", AGGREGATORS),
    "data.source": ("data source", SOURCES),
}
"""Choices of an entry of a table."""

_STARTED = ("prototypes.start_round", "objective.pull_weight")
VALUES: dict[str, dict[str, Reads]] = {
    "data.partition": {
        "auto": ("data.group_ratio",),
        "group": ("data.group_ratio",),
        "mixed": ("data.group_ratio", "data.mixing"),
        "dirichlet": ("data.dirichlet_alpha",),
    },
    "data.corrupted": {"above 0": ("data.corruption",)},
    "model.pooling": {"mean": ("model.shrinkage",)},
    "prior.weights": {"gumbel": ("prior.temperature",)},
    "prototypes.kind": {
        "learned": (*_STARTED, "prototypes.radius", "objective.orthonormal_weight"),
        "fixed": (*_STARTED, "prototypes.radius"),
        "anchored": (*_STARTED, "inference.latent_evidence"),
    },
    "inference.kind": {"population": ("inference.latent_evidence",)},
    "objective.kl_schedule": {
        "linear": ("objective.kl_warmup_rounds",),
        "cyclical": ("objective.kl_warmup_rounds",),
    },
    "federation.optimiser": {"sgd": ("federation.momentum",)},
}
"""Choices of a value."""


def leaf_settings(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """Dotted name of every setting, with its definition."""
    out: dict[str, FieldInfo] = {}
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            out.update(leaf_settings(kind, f"{prefix}{name}."))
        else:
            out[f"{prefix}{name}"] = info
    return out


RENAMED = {"data.source": "data", "data.columns": "column"}
"""Settings whose short name is not the last part of their name."""


@lru_cache
def short_names() -> dict[str, str]:
    """Dotted name to short name, as ``local-steps``, of the settings whose last part is unique."""
    settings = leaf_settings()
    counts = Counter(name.rsplit(".", 1)[-1] for name in settings)
    out = {}
    for name in settings:
        last = name.rsplit(".", 1)[-1]
        # 'enabled' says nothing without its section
        if name in RENAMED or (counts[last] == 1 and last != "enabled"):
            out[name] = RENAMED.get(name, last.replace("_", "-"))
    return out


def value_of(config: BaseModel, name: str) -> Any:
    """Value of a setting by its dotted name."""
    found: Any = config
    for step in name.split("."):
        found = getattr(found, step)
    return found


def settings_read(config: Config) -> set[str]:
    """Every setting that a run with this configuration reads."""
    anchored_sums = config.prior.kind == "components" and config.prototypes.kind == "anchored"
    # anchors take the place of the KL, so a prior of components is never its other side
    silent = set(PRIORS["components"].reads) if anchored_sums else set()
    bounds = config.entry.bounds if config.privacy.enabled else ()
    return _closure(config.entry, bounds, lambda choice: _chosen(config, choice)) - silent


@lru_cache
def settings_readable(name: str, preset: str = "default") -> set[str]:
    """Every setting that a run of this method reads with some choice of parts and values."""
    entry = entry_of(name, preset)
    return _closure(entry, entry.bounds, _all_of)


def _closure(entry: Method, more: Reads, reads_of: Any) -> set[str]:
    found: set[str] = set()
    waiting = _expanded((*EVERY, *entry.reads, *more))
    while waiting:
        found |= waiting
        chosen = [
            r for choice in waiting & (PARTS.keys() | VALUES.keys()) for r in reads_of(choice)
        ]
        waiting = _expanded(chosen) - found
    return found


def _expanded(patterns: Iterable[str]) -> set[str]:
    out: set[str] = set()
    for pattern in patterns:
        matching = {n for n in leaf_settings() if n.startswith(pattern.removesuffix("*"))}
        out |= matching if pattern.endswith("*") else {pattern}
    return out


def _chosen(config: Config, choice: str) -> Reads:
    value = value_of(config, choice)
    if choice in PARTS:
        kind, table = PARTS[choice]
        if choice == "data.source" and value not in table and not is_reference(value):
            value = "files"
        return part(kind, table, value).reads
    return VALUES[choice].get(_key(choice, value), ())


def _key(choice: str, value: Any) -> str:
    if choice == "data.corrupted":
        return "above 0" if value > 0 else "0"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _all_of(choice: str) -> Reads:
    entries = (
        [p.reads for p in PARTS[choice][1].values()] if choice in PARTS else VALUES[choice].values()
    )
    return tuple(name for reads in entries for name in reads)


def unread(config: Config, given: Iterable[str]) -> list[str]:
    """Of the settings that were given, those that nothing reads; one that asks for nothing (0,
    false or none, and so by default) is no harm."""
    read, leaves = settings_read(config), leaf_settings()
    return [
        name
        for name in sorted(given)
        if name in leaves and name not in read and not _asks_for_nothing(config, leaves, name)
    ]


def _asks_for_nothing(config: Config, leaves: Mapping[str, FieldInfo], name: str) -> bool:
    value = value_of(config, name)
    return not value and value == leaves[name].default


def why_unread(config: Config, name: str) -> str:
    """What would have to be chosen so that a setting is read."""
    takers = [m for m in METHODS if name in settings_readable(m)]
    if config.method not in takers:
        return f"{config.method} does not read it" + (
            f" (these methods do: {', '.join(takers)})" if takers else ""
        )
    ways = []
    if name in config.entry.bounds and not config.privacy.enabled:
        ways.append("privacy.enabled is false; it is read where that is true")
    for choice in sorted(PARTS.keys() | VALUES.keys()):
        table: Mapping[str, Reads] = (
            {n: p.reads for n, p in PARTS[choice][1].items()} if choice in PARTS else VALUES[choice]
        )
        values = [v for v, reads in table.items() if name in _expanded(reads)]
        if values and _key(choice, value_of(config, choice)) in values:
            # what it depends on is chosen rightly, and is itself not read
            return f"{choice} is not read: {why_unread(config, choice)}"
        if values:
            own = _key(choice, value_of(config, choice))
            ways.append(f"{choice} is {own}; it is read where that is {' or '.join(values)}")
    if config.prototypes.kind == "anchored" and name in PRIORS["components"].reads:
        ways.append("with prototypes.kind anchored, components are anchors and not the KL's prior")
    return "; ".join(ways)
