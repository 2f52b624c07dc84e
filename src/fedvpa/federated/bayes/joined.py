"""Several models, or the sums of several, as a few tensors: what of them travels.

Sizes by name: n models of t folds each, p inputs; over all of them o dimensions, u components, and
v numbers of components' centres.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedvpa.federated.bayes.messages import Slopes
from fedvpa.federated.bayes.models import Models, Structure, Width
from fedvpa.types import Params

MOST_MODELS, MOST_FOLDS, MOST_ORDER = 100, 21, 256
"""No search has more of them."""


def sizes_of(structures: Sequence[Structure], folds: int, inputs: int) -> dict[str, int]:
    """Sizes of the tensors of these models, by name."""
    count = [(s.order if s.kind == "groups" else 1, s.order) for s in structures]
    return {
        "n": len(count), "t": folds, "p": inputs, "o": sum(d for _, d in count),
        "u": sum(m for m, _ in count), "v": sum(m * d for m, d in count),
    }  # fmt: skip


def joined(models: Sequence[Models]) -> Params:
    """What a client reads of models that have the same folds."""
    return {
        "fold": models[0].fold,
        "size": torch.stack([m.size[0] for m in models]),
        "weight": torch.stack([m.weight for m in models]),
        "bilinear": torch.cat([m.bilinear for m in models], 1),
        "mean": torch.cat([m.mean.flatten(1) for m in models], 1),
        "variance": torch.cat([m.variance for m in models], 1),
        "share": torch.cat([m.share for m in models], 1),
    }


def parted(tensors: Mapping[str, Tensor]) -> list[Models]:
    """Inverse of `joined`; penalties and scales, which clients do not read, are blank.

    Raises:
        ValueError: these are not the tensors of models.
    """
    size, fold = tensors["size"], tensors["fold"]
    n, t, (p,) = len(size), len(fold), tensors["weight"].shape[2:]
    fine = size.dim() == 2 and size.shape[1] == 3 and 0 < n <= MOST_MODELS
    fine = fine and fold.dim() == 1 and 0 < t <= MOST_FOLDS
    if not fine or not bool(((size[:, :2] >= 1) & (size[:, :2] <= MOST_ORDER)).all()):
        raise ValueError("no models of these sizes")
    m, d = size[:, 0].tolist(), size[:, 1].tolist()
    shapes = {
        "weight": (n, t, p), "bilinear": (t, sum(d), p), "variance": (t, sum(m)),
        "share": (t, sum(m)), "mean": (t, sum(a * b for a, b in zip(m, d))),
    }  # fmt: skip
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape or not tensors[name].isfinite().all():
            raise ValueError(f"'{name}' does not fit the models")
    bilinear = tensors["bilinear"].split(d, 1)
    mean = tensors["mean"].split([a * b for a, b in zip(m, d)], 1)
    variance, share = tensors["variance"].split(m, 1), tensors["share"].split(m, 1)
    return [
        Models(
            tensors["weight"][i], bilinear[i], mean[i].unflatten(1, (m[i], d[i])), variance[i],
            share[i], fold, size[i].expand(t, 3), torch.zeros(t), torch.ones(t, p),
        )
        for i in range(n)
    ]  # fmt: skip


def joined_slopes(sums: Sequence[Slopes]) -> Params:
    """The sums of several models."""
    return {
        "weight": torch.stack([s.weight for s in sums]),
        "bilinear": torch.cat([s.bilinear for s in sums], 1),
        "targets": torch.stack([s.targets for s in sums]),
        "loss": torch.stack([s.loss for s in sums]),
        "share": torch.cat([s.share for s in sums], 1),
        "mode": torch.cat([s.mode.flatten(1) for s in sums], 1),
        "divergence": torch.stack([s.divergence for s in sums]),
        "clients": torch.stack([s.clients for s in sums]),
    }


def parted_slopes(tensors: Mapping[str, Tensor], models: Sequence[Models]) -> list[Slopes]:
    """Inverse of `joined_slopes`, for sums of these models."""
    m, d = [x.shape[0] for x in models], [x.shape[1] for x in models]
    bilinear, share = tensors["bilinear"].split(d, 1), tensors["share"].split(m, 1)
    mode = tensors["mode"].split([a * b for a, b in zip(m, d)], 1)
    return [
        Slopes(
            tensors["weight"][i], bilinear[i], tensors["targets"][i], tensors["loss"][i], share[i],
            mode[i].unflatten(1, (m[i], d[i])), tensors["divergence"][i], tensors["clients"][i],
        )
        for i in range(len(models))
    ]  # fmt: skip


def joined_widths(widths: Sequence[Sequence[Width]]) -> Params:
    """At which widths each model is judged."""
    return {
        "options": torch.tensor([len(own) for own in widths]),
        "width": torch.tensor([list(w) for own in widths for w in own]),
    }


def parted_widths(tensors: Mapping[str, Tensor]) -> list[list[Width]]:
    """Inverse of `joined_widths`.

    Raises:
        ValueError: these are no widths.
    """
    count, width = tensors["options"].tolist(), tensors["width"]
    if width.shape != (sum(count), 2) or min(count) < 1 or not width.isfinite().all():
        raise ValueError("no widths")
    return [[Width(*row) for row in part.tolist()] for part in width.split(count)]
