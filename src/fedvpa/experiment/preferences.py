"""The preferences that a selector has found: their names, who has them, and what they like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fedvpa.config import FEDERATION
from fedvpa.data.partition import without_duplicates
from fedvpa.errors import BadInputError
from fedvpa.experiment.dataset import training_data
from fedvpa.experiment.selectors import Selector
from fedvpa.experiment.use import PreferenceModel
from fedvpa.records import PreferencePair

RESERVED = ("neutral", "base")
"""Names that mean something else where a preference is asked for."""
MOST_PAIRS = 2000
"""Pairs among which those are looked for that a preference likes most."""


def named_preferences(selector: Selector) -> dict[str, Float[Tensor, "d"]]:
    """z of each prototype, called by the group of most training clients near it (``GROUP-1``,
    ``GROUP-2`` where several are), or ``prototype-K`` where that is unknown. Of users who differ by
    degree: both ends of each main direction, ``direction-K-high`` and ``direction-K-low``.

    Raises:
        BadInputError: the run fitted no components and has no prototypes.
    """
    prototypes = selector.prototypes
    if prototypes is None:
        raise BadInputError(
            f"{selector.run.paths.root}: has no preferences to tell apart: its method knows none"
            " (train with --method fedvpa-gp), or its users do not differ measurably"
        )
    if selector.directions is not None:
        ends = [f"direction-{k + 1}-{end}" for k in range(selector.directions)
                for end in ("high", "low")]  # fmt: skip
        return dict(zip(ends, prototypes))
    groups = selector.component_groups or [None] * len(prototypes)
    return dict(zip(preference_names(groups), prototypes))


def preference_names(groups: Sequence[str | None]) -> list[str]:
    """A name of its own for each component, from the group of most clients near it.

    >>> preference_names(["kind", None, "blunt", "kind"])
    ['kind-1', 'prototype-1', 'blunt', 'kind-2']
    """
    names: list[str] = []
    for k, group in enumerate(groups):
        if group is None:
            name = f"prototype-{k}"
        elif groups.count(group) == 1 and group not in RESERVED:
            name = group
        else:
            name = f"{group}-{groups[: k + 1].count(group)}"
        while name in names or (name in groups and name != group):
            name += "'"
        names.append(name)
    return names


def described(
    model: PreferenceModel, pairs: Sequence[PreferencePair] | None = None, top: int = 3
) -> list[dict[str, Any]]:
    """Each preference: name, share of users, group of most clients near it, and the pairs that it
    decides most unlike the other preferences.

    Args:
        model: the selector.
        pairs: those to look at (None: those that the run was trained on).
        top: pairs per preference.

    Raises:
        BadInputError: the run has no preferences, or its pairs are not here.
    """
    names = list(named_preferences(model))
    population, prototypes = model.population, model.prototypes
    assert prototypes is not None
    shared = population is not None and len(population.weight) == len(names)
    pairs = _some(_trained_pairs(model) if pairs is None else pairs)
    margins = model.margins(pairs, prototypes)
    # against the mean over the other preferences; a single one is shown what it likes most
    others = (margins.sum(0) - margins) / max(1, len(names) - 1)
    unlike = margins - others if len(names) > 1 else margins
    rows = []
    for k, name in enumerate(names):
        order = unlike[k].abs().argsort(descending=True)[:top].tolist()
        rows.append({
            "name": name,
            "share": float(population.weight[k]) if population is not None and shared else None,
            "nearest_group": (model.component_groups or [None] * len(names))[k],
            "pairs": [_shown(pairs[i], float(margins[k, i]), float(others[k, i])) for i in order],
        })  # fmt: skip
    return rows


def _trained_pairs(model: PreferenceModel) -> list[PreferencePair]:
    config = model.run.config
    if config.data.source == FEDERATION:
        raise BadInputError(
            "preferences: the pairs of a federation are its clients'; say which to look at, --data"
        )
    return [pair for client in training_data(config).train for pair in client.pairs]


def _some(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    distinct = without_duplicates(pairs)
    step = max(1, len(distinct) // MOST_PAIRS)
    return distinct[::step][:MOST_PAIRS]


def _shown(pair: PreferencePair, margin: float, others: float) -> dict[str, Any]:
    """The pair with the response first that the preference likes."""
    liked, other = (pair.chosen, pair.rejected) if margin > others else (pair.rejected, pair.chosen)
    return {
        "prompt": pair.prompt[-1].content,
        "liked": liked,
        "other": other,
        "margin": abs(margin) if (margin > 0) == (margin > others) else -abs(margin),
        "margin_of_others": others if margin > others else -others,
    }
