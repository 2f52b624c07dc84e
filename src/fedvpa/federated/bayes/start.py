"""Where training starts: candidates from first moments of the clients' pairs (M9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fedvpa.federated.bayes.messages import Outline
from fedvpa.federated.bayes.models import (
    KINDS,
    WHITE_INPUTS,
    Models,
    Structure,
    groups_of,
    structures,
)
from fedvpa.federated.bayes.side import BayesSide
from fedvpa.federated.components import Moments, fit
from fedvpa.federated.content import ALL

LOGISTIC = 4.0
"""A unit of reward moves a choice's probability by a quarter at the most; so many times a mean
difference is a reward's direction, to first order."""
LEAST_SCALE = 1e-3
"""Inputs whose standard deviation is less than this share of the first one's are noise."""
SMALLEST = 1e-3
"""Smallest variance of a direction at the start."""


@dataclass(frozen=True)
class Starts:
    """What is tried, and from where.

    Args:
        inputs: dimensions of the features.
        latent: dimensions of z.
        kind: one wide component of directions, narrow groups, or both are tried.
        order: how many directions or groups.
        ridge: weight of the squared parameters, per pair.
        searches_width: whether the prior's width is to be found.
        folds: of the contents.
        radius: of the groups' centres, which are orthogonal.
        spread: standard deviation of a group.
        seed: of the starts of k-means.
    """

    inputs: int
    latent: int
    kind: Literal["auto", "directions", "groups"] = "auto"
    order: int | Literal["auto"] = "auto"
    ridge: float | Literal["auto"] = "auto"
    searches_width: bool = True
    folds: int = 3
    radius: float = 1.5
    spread: float = 0.14
    seed: int = 0

    def candidates(self, clients: BayesSide) -> tuple[list[Models], bool]:
        """Candidates at their starts, and whether folds are by prompt: a shared reward, and
        directions from the covariance between clients. Groups come later (see `groups`)."""
        fold = torch.tensor([ALL, *range(self.folds)] if self.searched else [ALL])
        outline = clients.outline(True, fold)
        by_prompt = bool(2 * outline.several >= outline.clients)
        if not by_prompt and self.searched:  # most clients have one prompt
            outline = clients.outline(False, fold)
        tried = structures(
            self.kind, self.order, self.ridge, latent=self.latent,
            inputs=self.inputs, pairs=int(outline.pairs[0]),
        )  # fmt: skip
        return [self._directions(s, fold, outline) for s in tried], by_prompt

    @property
    def searched(self) -> bool:
        """Whether anything is left to be chosen."""
        return self.searches_width or "auto" in (self.kind, self.order, self.ridge)

    def numbers(self, clients: int) -> Sequence[int]:
        """Numbers of groups that are tried."""
        if self.kind == "directions":
            return ()
        if self.order != "auto":
            return (self.order,) if self.order > 1 else ()
        found = groups_of(self.latent, clients)
        # who asks for groups alone gets two, however few the clients
        return found or ((2,) if self.kind == "groups" else ())

    def groups(
        self, clients: BayesSide, found: Models, by_prompt: bool, numbers: Sequence[int]
    ) -> list[Models]:
        """Candidates of groups, from clusters of the clients' posterior means under trained
        directions (every fold has its own): their rewards there."""
        each: dict[int, list[Moments]] = {number: [] for number in numbers}
        for t in range(len(found.fold)):
            ask = partial(clients.moments, found.at([t]), by_prompt=by_prompt)
            clusters = fit(ask, found.shape[1], numbers, self.seed)
            for number, own in clusters.items():
                each[number].append(own)
        return [self._groups(found, number, own) for number, own in each.items()]

    def _blank(self, structure: Structure, fold: Tensor, outline: Outline) -> Models:
        t, (p, d) = len(fold), (self.inputs, structure.order)
        size = torch.tensor([1, d, KINDS.index(structure.kind)]).expand(t, 3)
        return Models(
            torch.zeros(t, p), torch.zeros(t, d, p), torch.zeros(t, 1, d), torch.ones(t, 1),
            torch.ones(t, 1), fold, size.clone(),
            torch.full((t,), structure.ridge), self._scale(structure, outline),
        )  # fmt: skip

    def _scale(self, structure: Structure, outline: Outline) -> Tensor:
        """The scale [t, p] of every input in which its penalty and its steps count."""
        if not structure.white:
            return torch.ones_like(outline.square)
        scale = (outline.square / outline.pairs.clamp_min(1).unsqueeze(-1)).sqrt()
        read = (torch.arange(scale.shape[-1]) < WHITE_INPUTS) & (scale > LEAST_SCALE)
        return torch.where(read, scale, 0.0)

    def _groups(self, found: Models, number: int, clusters: Sequence[Moments]) -> Models:
        """Narrow components; the change of coordinates that makes their centres orthogonal leaves
        every reward as it was (M6)."""
        t, p = found.weight.shape
        weight = torch.stack([own.weight for own in clusters])
        centre = torch.stack([own.total for own in clusters]) / weight.clamp_min(1).unsqueeze(-1)
        reward = found.weight.unsqueeze(-2) + centre @ found.bilinear
        size = torch.tensor([number, number, KINDS.index("groups")]).expand(t, 3)
        return Models(
            torch.zeros(t, p), reward / self.radius,
            self.radius * torch.eye(number).expand(t, -1, -1).clone(),
            torch.full((t, number), self.spread**2),
            (weight + 1) / (weight + 1).sum(-1, keepdim=True), found.fold, size.clone(),
            found.ridge, found.scale,
        )  # fmt: skip

    def _directions(self, structure: Structure, fold: Tensor, outline: Outline) -> Models:
        """One wide component along the leading directions in which clients differ."""
        blank, d = self._blank(structure, fold, outline), structure.order
        for t in range(len(fold)):
            mean = outline.total[t] / outline.pairs[t].clamp_min(1)
            scale = blank.scale[t]
            blank.weight[t] = 0.5 * LOGISTIC * over(mean, scale.square())
            if structure.kind == "shared":
                continue
            cross = outline.cross[t] / outline.counted[t].clamp_min(1)
            half = outline.halves[t].mean(0) / outline.counted[t].clamp_min(1)
            between = over(over(cross - torch.outer(half, half), scale).T, scale)
            values, vectors = torch.linalg.eigh(LOGISTIC**2 * between.double())
            values, vectors = values.flip(0)[:d], vectors.flip(1)[:, :d]
            largest = vectors.abs().argmax(0)
            vectors = vectors * vectors[largest, torch.arange(d)].sign()
            spread = values.clamp_min(SMALLEST).sqrt()
            blank.bilinear[t] = over((0.7 * spread * vectors).T.float(), scale)
        return blank


def over(value: Tensor, scale: Tensor) -> Tensor:
    """Divided by the inputs' scales; 0 where an input is not read."""
    return torch.where(scale > 0, value / scale.clamp_min(LEAST_SCALE**2), 0.0)
