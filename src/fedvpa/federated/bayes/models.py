"""The models that a search trains side by side (M9): how many components, how strong a penalty, and
which contents are kept from each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from fedvpa.selector.bayes import BILINEAR, WEIGHT
from fedvpa.types import Params, Population

DIRECTIONS = (1, 2, 4, 8)
"""Dimensions of one wide component that are tried."""
SCAFFOLD = 8
"""Directions by which so many groups as the settings say are found."""
GROUPS = (2, 3, 4, 6, 8)
"""Numbers of narrow components that are tried."""
RIDGES = (1e-3, 3e-3, 1e-2, 3e-2)
"""Penalties that are tried; three of them, by the number of pairs."""
WHITE_INPUTS, WHITE_RIDGE = 32, 1e-3
"""Inputs, and the one penalty, of candidates that count their inputs alike."""
FEW_PAIRS = 500
"""With fewer pairs than this the weakest penalty is left out, with more the strongest."""
EFFECTS = (0.0, 0.15, 0.25, 0.35, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
"""Factors on the effect of z that are tried, of one wide component; under 0 everybody is the mean
user."""
GROUP_EFFECTS, SPREADS = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0), (0.0, 1.0, 3.0)
"""The same of narrow components, and factors on their spread; under 0 these are points."""
NARROWEST = 0.05
"""A group that was judged as a point is served with this factor on its spread."""

Kind = Literal["shared", "directions", "groups"]
KINDS: tuple[Kind, ...] = ("shared", "directions", "groups")


class Width(NamedTuple):
    """Factors on the prior's standard deviations: on the effect of all of z (so that groups are
    farther apart, too), and on the spread within a group."""

    effect: float = 1.0
    spread: float = 1.0


class Structure(NamedTuple):
    """One wide component with so many directions, or so many narrow ones, or one reward for
    everybody; and the L2 penalty per pair on what they like."""

    kind: Kind
    order: int
    ridge: float
    white: bool = False
    """Whether the penalty, and the optimiser's steps, count the inputs as if all had the same
    variance; then the first `WHITE_INPUTS` alone are read."""


def structures(
    kind: Literal["auto", "directions", "groups"], order: int | Literal["auto"],
    ridge: float | Literal["auto"], *, latent: int, inputs: int, pairs: int,
) -> list[Structure]:  # fmt: skip
    """What is trained from the start: all that the settings leave open and the data can bear. A
    shared reward is always trained beside; groups begin where directions find them.

    Args:
        kind: directions, groups, or both.
        order: how many of them, or all that are tried.
        ridge: the penalty, or those that are tried with so many pairs.
        latent: dimensions of z, the most that an order can be.
        inputs: dimensions of the features.
        pairs: training pairs of all clients.
    """
    ridges: Sequence[float] = RIDGES[1:] if pairs < FEW_PAIRS else RIDGES[:-1]
    if ridge != "auto":
        ridges = (ridge,)
    wide: Sequence[int] = [d for d in DIRECTIONS if d <= min(latent, inputs)] or [1]
    if order != "auto":
        wide = [min(SCAFFOLD if kind == "groups" else order, latent, inputs)]
    penalties = [(r, False) for r in ridges]
    if ridge == "auto" and pairs >= FEW_PAIRS:
        penalties.append((WHITE_RIDGE, True))
    found = []
    for r, white in penalties:
        found.append(Structure("shared", 1, r, white))
        found += [Structure("directions", d, r, white) for d in wide]
    return found


def groups_of(latent: int, clients: int) -> Sequence[int]:
    """Numbers of groups that so many clients can bear."""
    return [m for m in GROUPS if m <= min(latent, clients // 3)]


class Models(NamedTuple):
    """The parameters of t candidates of one structure: reward w and W, centres, variances and
    weights of the components, the fold that is kept from each, how many components and dimensions
    there are and of what kind (index of `KINDS`), the penalty, and the scale of each input in which
    it counts (0: the input is not read)."""

    weight: Float[Tensor, "t p"]
    bilinear: Float[Tensor, "t d p"]
    mean: Float[Tensor, "t m d"]
    variance: Float[Tensor, "t m"]
    share: Float[Tensor, "t m"]
    fold: Int[Tensor, "t"]
    size: Int[Tensor, "t 3"]
    ridge: Float[Tensor, "t"]
    scale: Float[Tensor, "t p"]

    def at(self, index: Tensor | slice | list[int]) -> Models:
        """Some of them."""
        return Models(*(value[index] for value in self))

    @property
    def shape(self) -> tuple[int, int]:
        """Components and dimensions."""
        m, d, _ = self.size[0].tolist()
        return m, d

    @property
    def structure(self) -> Structure:
        """What all of them are."""
        _, order, kind = self.size[0].tolist()
        white = bool((self.scale[0] != 1).any())
        return Structure(KINDS[kind], order, round(float(self.ridge[0]), 9), white)

    def served(self, width: Width, latent: int) -> tuple[Params, Population]:
        """Parameters and prior of the first one, in so many dimensions, of which the last ones do
        nothing."""
        m, d = self.shape
        bilinear = pad(self.bilinear[0], (0, 0, 0, latent - d)) * width.effect
        variance = self.variance[0] * (1.0 if m == 1 else max(width.spread, NARROWEST) ** 2)
        share, mean = self.share[0], pad(self.mean[0], (0, latent - d))
        params = {WEIGHT: self.weight[0], BILINEAR: bilinear}
        return params, Population(mean, variance, share / share.sum())


def trained_of(models: Models) -> Params:
    """What the server's optimiser steps on."""
    return {WEIGHT: models.weight, BILINEAR: models.bilinear}


def packed(trained: Sequence[Models], slots: Sequence[Params], rest: Params) -> Params:
    """Candidates and the moments of their optimiser as tensors by name."""
    out = {n: v for n, v in rest.items() if not n.startswith(("model", "slot"))}
    for i, models in enumerate(trained):
        out |= {f"model{i}/{name}": value for name, value in models._asdict().items()}
    for i, own in enumerate(slots):
        out |= {f"slot{i}/{name}": value for name, value in own.items()}
    return out


def unpacked(components: Params) -> tuple[list[Models], list[Params]]:
    """Inverse of `packed`."""
    trained, slots = list[Models](), list[Params]()
    while f"model{len(trained)}/weight" in components:
        i = len(trained)
        trained.append(Models(*(components[f"model{i}/{name}"] for name in Models._fields)))
        prefix = f"slot{i}/"
        slots.append(
            {n.removeprefix(prefix): v for n, v in components.items() if n.startswith(prefix)}
        )
    return trained, slots
