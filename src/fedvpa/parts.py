"""What can be chosen by name: priors, reward heads, aggregators, data sources, judges.

Each kind is one typed table. An entry says what the part is, which settings it reads, and where its
builder is; nothing is imported before the part is used. To add a part, write one file and add one
line here; or keep the file outside of fedvpa and name it as ``package.module:NAME``, where ``NAME``
is a `Part`. docs/extending.md shows one of each kind.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedvpa.errors import BadInputError

REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""How a part outside of fedvpa is named."""


@dataclass(frozen=True)
class Part:
    """An entry of a table.

    Args:
        about: what the part is, in a few words; help texts and the documentation show it.
        build: its builder, called with keywords alone (the kind's protocol says which), or where
            the builder is, as ``package.module:function``.
        reads: the settings that are read if this part is chosen; ``section.*`` stands for all of a
            section.
    """

    about: str
    build: str | Callable[..., Any]
    reads: tuple[str, ...] = ()


Table = dict[str, Part]

_MIXTURE = ("prior.weights", "prior.estimator", "prior.start_round")

PRIORS: Table = {
    "gaussian": Part("N(0, I)", "fedvpa.federated.priors.gaussian:build"),
    "peers": Part(
        "the mixture of the peers' posteriors (M3)",
        "fedvpa.federated.priors.peers:build",
        (*_MIXTURE, "prior.exclude_self", "prior.max_components", "prior.members"),
    ),
    "components": Part(
        "components that are fitted from sums over clients, so that nobody's latent is seen",
        "fedvpa.federated.priors.components:build",
        _MIXTURE,
    ),
}
"""Priors of z in training; see `fedvpa.federated.priors.Prior`."""

HEADS: Table = {
    "bilinear": Part(
        "z picks a direction of reward",
        "fedvpa.selector.heads.bilinear:build",
        ("model.rank", "objective.reward_decay"),
    ),
    "concat": Part(
        "an MLP on [h; z] (VPL)", "fedvpa.selector.heads.concat:build", ("model.reward_hidden",)
    ),
    "film": Part(
        "an MLP whose hidden units z scales and shifts",
        "fedvpa.selector.heads.film:build",
        ("model.reward_hidden",),
    ),
    "additive": Part("the paper's: z shifts the choice", "fedvpa.selector.heads.additive:build"),
}
"""Reward heads: how z steers the reward; see `fedvpa.selector.heads.Head`."""

AGGREGATORS: Table = {
    "mean": Part("weighted mean (FedAvg)", "fedvpa.federated.aggregators:build_mean"),
    "trimmed-mean": Part(
        "mean of each coordinate without its extremes",
        "fedvpa.federated.aggregators:build_trimmed_mean",
        ("federation.trim",),
    ),
    "median": Part("median of each coordinate", "fedvpa.federated.aggregators:build_median"),
    "krum": Part(
        "mean of the clients that are nearest to each other (Multi-Krum)",
        "fedvpa.federated.aggregators:build_krum",
        ("federation.trim",),
    ),
}
"""How clients' updates become one; see `fedvpa.federated.aggregators.Aggregator`."""

SOURCES: Table = {
    "personas": Part(
        "built-in users with known preferences",
        "fedvpa.data.sources:personas",
        ("data.personas.*",),
    ),
    "federation": Part(
        "pairs that the clients of a federation keep", "fedvpa.data.sources:elsewhere"
    ),
    "files": Part(
        "a file, a folder, or a dataset of the Hub",
        "fedvpa.data.sources:files",
        (
            "data.split",
            "data.partition",
            "data.protocol",
            "data.max_pairs",
            "data.on_bad_record",
            "data.columns",
            "data.score_margin",
        ),
    ),
}
"""Where comparisons come from; see `fedvpa.data.sources.Source`. Any other name is of `files`."""

JUDGES: Table = {
    "exact": Part("exact measures of persona attributes", "fedvpa.winrate.exact:build"),
    "reward": Part("a reward model per group on another backbone", "fedvpa.winrate.reward:build"),
    "endpoint": Part("an OpenAI-compatible endpoint", "fedvpa.winrate.endpoint:build"),
}
"""Judges of win rates; see `fedvpa.winrate.judges.Judge`."""


def is_reference(name: str) -> bool:
    """Whether a name has the form ``package.module:NAME``."""
    return REFERENCE.fullmatch(name) is not None


def part(kind: str, table: Table, name: str) -> Part:
    """The entry of that name, or the `Part` that ``package.module:NAME`` refers to.

    Raises:
        BadInputError: no such entry (the known ones are listed), or nothing there.

    Example:
        >>> part("prior", PRIORS, "gaussian").about
        'N(0, I)'
    """
    if name in table:
        return table[name]
    if not is_reference(name):
        raise BadInputError(
            f"unknown {kind} '{name}' (known: {', '.join(table)}; or package.module:NAME)"
        )
    found = resolve(name)
    if not isinstance(found, Part):
        raise BadInputError(f"{kind} '{name}': is a {type(found).__name__}, not a fedvpa.Part")
    return found


def resolve(reference: str) -> Any:
    """What ``package.module:NAME`` refers to; modules of the current folder are found as well.

    Raises:
        BadInputError: no such module, or nothing of that name in it.
    """
    module, _, name = reference.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # at the end: nothing that is installed is hidden by it
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BadInputError(
            f"'{reference}' cannot be imported: {error} (modules are looked for in the current"
            " folder and on PYTHONPATH)"
        ) from error


def builder(entry: Part) -> Callable[..., Any]:
    """The entry's builder, imported if need be."""
    build = resolve(entry.build) if isinstance(entry.build, str) else entry.build
    if not callable(build):
        raise BadInputError(f"'{entry.build}' is not a function that builds a part")
    found: Callable[..., Any] = build
    return found


@dataclass(frozen=True)
class Known:
    """Validates a setting that names an entry of a table."""

    kind: str
    table: Table

    def __call__(self, value: str) -> str:
        """The value itself.

        Raises:
            ValueError: it names no entry.
        """
        try:
            part(self.kind, self.table, value)
        except BadInputError as error:
            raise ValueError(str(error)) from error
        return value
