"""Where training starts: candidates from first moments of the clients' pairs (M9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedvpa.federated.bayes.clients import BayesClients
from fedvpa.federated.bayes.messages import Outline
from fedvpa.federated.bayes.models import ALL, KINDS, WHITE_INPUTS, Models, Structure, structures
from fedvpa.federated.components import fit

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

    def candidates(self, clients: BayesClients) -> tuple[list[Models], bool]:
        """Candidates at their starts, and whether folds are by prompt: directions from the
        covariance between clients, groups from clusters of the clients' mean differences."""
        everything = clients.outline(True, torch.tensor([ALL]))
        by_prompt = bool(2 * everything.several >= everything.clients)
        tried = structures(
            self.kind, self.order, self.ridge, latent=self.latent,
            inputs=self.inputs, pairs=int(everything.pairs[0]),
            clients=int(everything.clients),
        )  # fmt: skip
        searched = self.searches_width or sum(s.kind != "shared" for s in tried) > 1
        fold = torch.tensor([ALL, *range(self.folds)] if searched else [ALL])
        outline = clients.outline(by_prompt, fold)
        numbers = sorted({s.order for s in tried if s.kind == "groups"})
        centres = self._centres(clients, numbers, fold, by_prompt) if numbers else {}
        trained = [
            self._groups(s, fold, outline, centres[s.order]) if s.kind == "groups"
            else self._directions(s, fold, outline)
            for s in tried
        ]  # fmt: skip
        return trained, by_prompt

    def _centres(
        self, clients: BayesClients, numbers: Sequence[int], fold: Tensor, by_prompt: bool
    ) -> dict[int, Tensor]:
        """Centres [t, m, p] of each number of clusters: found on all pairs, then the means without
        each fold."""

        def ask(centre: Tensor, withhold: bool = False) -> Any:
            return clients.moments(centre, ALL, by_prompt)

        found = fit(ask, self.inputs, numbers, self.seed)
        out = {}
        for number in numbers:
            centre = found[number].total / found[number].weight.clamp_min(1e-9).unsqueeze(-1)
            each = []
            for f in fold.tolist():
                own = clients.moments(centre.unsqueeze(0), f, by_prompt)
                held = own.weight[0].unsqueeze(-1)
                each.append(torch.where(held > 0.5, own.total[0] / held.clamp_min(1), centre))
            out[number] = torch.stack(each)
        return out

    def _blank(self, structure: Structure, fold: Tensor, outline: Outline) -> Models:
        t, (p, d) = len(fold), (self.inputs, self.latent)
        m = structure.order if structure.kind == "groups" else 1
        size = torch.tensor([m, structure.order, KINDS.index(structure.kind)]).expand(t, 3)
        return Models(
            torch.zeros(t, p), torch.zeros(t, d, p), torch.zeros(t, m, d), torch.ones(t, m),
            torch.full((t, m), 1 / m), fold, size.clone(),
            torch.full((t,), structure.ridge), self._scale(structure, outline),
        )  # fmt: skip

    def _scale(self, structure: Structure, outline: Outline) -> Tensor:
        """The scale [t, p] of every input in which its penalty and its steps count."""
        if not structure.white:
            return torch.ones_like(outline.square)
        scale = (outline.square / outline.pairs.clamp_min(1).unsqueeze(-1)).sqrt()
        read = (torch.arange(scale.shape[-1]) < WHITE_INPUTS) & (scale > LEAST_SCALE)
        return torch.where(read, scale, 0.0)

    def _groups(
        self, structure: Structure, fold: Tensor, outline: Outline, centre: Tensor
    ) -> Models:
        """Narrow components at orthogonal centres; the rewards there are along the clusters'."""
        blank, m = self._blank(structure, fold, outline), structure.order
        blank.mean[:, :, :m] = self.radius * torch.eye(m)
        blank.variance[:] = self.spread**2
        towards = over(centre, blank.scale.square().unsqueeze(-2))
        blank.bilinear[:, :m] = 0.5 * LOGISTIC / self.radius * towards
        return blank

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
            blank.bilinear[t, :d] = over((0.7 * spread * vectors).T.float(), scale)
        return blank


def over(value: Tensor, scale: Tensor) -> Tensor:
    """Divided by the inputs' scales; 0 where an input is not read."""
    return torch.where(scale > 0, value / scale.clamp_min(LEAST_SCALE**2), 0.0)
