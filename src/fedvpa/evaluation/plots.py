"""Figures of the report, each as an SVG string; colours tell groups apart for colour-blind
readers too (Okabe-Ito)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from torch import Tensor

from fedvpa.evaluation.statistics import told_apart
from fedvpa.foreign import harmless
from fedvpa.types import Posterior

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8A6D3B",
    "#5A4FCF",
    "#777777",
    "#B22222",
)
GREY = "#888888"


def label(name: object) -> str:
    """A name as it is drawn: on one line, never as mathematics, never hidden from a legend."""
    text = harmless(name, 60).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def figure(width: float = 5.4, height: float = 3.6) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes, without a global state."""
    fig = Figure(figsize=(width, height), layout="constrained")
    axes = fig.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return fig, axes


def svg(fig: Figure) -> str:
    """The figure as SVG text that can stand in a page; the same figure gives the same text."""
    out = io.StringIO()
    with (
        matplotlib.rc_context({"svg.hashsalt": "fedvpa", "svg.fonttype": "none"}),
        warnings.catch_warnings(),
    ):
        # text stays text: whoever shows the figure has the letters, or has not
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        fig.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def latent_map(
    seen: Posterior, unseen: Posterior | None, prototypes: Float[Tensor, "m d"] | None,
    seen_group: Int[Tensor, "k"], unseen_group: Int[Tensor, "u"], names: Sequence[str],
) -> Figure:  # fmt: skip
    """Posteriors on the two leading principal axes of the seen clients' means: one-sigma ellipses,
    prototypes as stars."""
    centre = seen.mean.mean(0)
    axes_2d = torch.linalg.svd(seen.mean - centre, full_matrices=False).Vh[:2]
    if axes_2d.shape[0] < 2:
        axes_2d = torch.cat([axes_2d, torch.zeros(2 - axes_2d.shape[0], axes_2d.shape[1])])
    fig, axes = figure(6.2, 4.6)
    for posterior, group, marker, whose in (
        (seen, seen_group, "o", "seen"),
        (unseen, unseen_group, "^", "unseen"),
    ):
        if posterior is None:
            continue
        at = (posterior.mean - centre) @ axes_2d.T
        covariance = torch.einsum("ad,kd,bd->kab", axes_2d, posterior.log_var.exp(), axes_2d)
        for g in sorted(set(group.tolist())):
            colour = COLOURS[g % len(COLOURS)] if g >= 0 else GREY
            mine = group == g
            name = label(names[g]) if g >= 0 else "no group"
            face = colour if marker == "o" else "none"
            axes.scatter(
                at[mine, 0],
                at[mine, 1],
                s=26,
                marker=marker,
                c=face,
                edgecolors=colour,
                label=f"{name}, {whose}",
                zorder=3,
            )
            for point, cov in zip(at[mine], covariance[mine]):
                axes.add_patch(_ellipse(point, cov, colour))
    if prototypes is not None:
        stars = (prototypes - centre) @ axes_2d.T
        axes.scatter(
            stars[:, 0], stars[:, 1], s=150, marker="*", c="black", label="prototype", zorder=4
        )
    axes.set_xlabel("first principal axis of z")
    axes.set_ylabel("second")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return fig


def _ellipse(point: Tensor, covariance: Float[Tensor, "2 2"], colour: str) -> Ellipse:
    values, vectors = torch.linalg.eigh(covariance)
    width, height = (2 * values.clamp_min(0).sqrt()).tolist()
    angle = float(torch.rad2deg(torch.atan2(vectors[1, 0], vectors[0, 0])))
    return Ellipse(
        (float(point[0]), float(point[1])), width, height, angle=angle, fc=colour, alpha=0.07, lw=0
    )


def learning_curves(history: Sequence[dict[str, Any]]) -> Figure:
    """Local loss by round, and accuracy on the clients' validation pairs."""
    fig, axes = figure()
    rounds = [row["round"] for row in history if "loss" in row]
    axes.plot(
        rounds,
        [row["loss"] for row in history if "loss" in row],
        color=COLOURS[0],
        label="local loss",
    )
    axes.set_xlabel("round")
    axes.set_ylabel("local loss (nats)", color=COLOURS[0])
    checked = [row for row in history if "validation_accuracy" in row]
    if checked:
        right = axes.twinx()
        right.spines["top"].set_visible(False)
        right.plot(
            [r["round"] for r in checked], [r["validation_accuracy"] for r in checked],
            color=COLOURS[1], marker=".",
        )  # fmt: skip
        right.set_ylabel("validation accuracy", color=COLOURS[1])
    return fig


def few_shot_curve(few_shot: dict[str, Any], names: Sequence[str]) -> Figure:
    """Accuracy by number of context pairs, with 95 % intervals, over all clients and by group."""
    fig, axes = figure()
    sizes = [int(s) for s in few_shot]
    position = np.arange(len(sizes))
    for g, name in enumerate(names):
        rows = [few_shot[str(s)]["by_group"].get(name) for s in sizes]
        if all(r is not None and r["n"] for r in rows):
            axes.plot(
                position,
                [r["mean"] for r in rows],
                color=COLOURS[g % len(COLOURS)],
                alpha=0.6,
                lw=1,
                label=label(name),
            )
    every = [few_shot[str(s)]["accuracy"] for s in sizes]
    axes.plot(
        position, [r["mean"] for r in every], color="black", marker="o", ms=4, label="all clients"
    )
    axes.fill_between(
        position,
        [r["low"] for r in every],
        [r["high"] for r in every],
        color="black",
        alpha=0.12,
        lw=0,
    )
    axes.axhline(0.5, color=GREY, lw=0.8, ls=":")
    axes.set_xticks(position, [str(s) for s in sizes])
    axes.set_xlabel("context pairs")
    axes.set_ylabel("accuracy on disjoint targets")
    axes.legend(fontsize=7, frameon=False)
    return fig


def controls(accuracy: dict[str, Any]) -> Figure:
    """Accuracy under the user's own z and under the controls."""
    fig, axes = figure(5.4, 2.8)
    wanted = told_apart(accuracy)
    for i, name in enumerate(reversed(wanted)):
        value = accuracy[name]
        axes.barh(
            i,
            value["mean"],
            color=COLOURS[0] if name in ("own", "worst_group") else GREY,
            height=0.65,
        )
        axes.plot([value["low"], value["high"]], [i, i], color="black", lw=1.2)
        axes.annotate(
            f"{value['mean']:.2f}", (value["mean"], i), xytext=(3, 5), textcoords="offset points",
            fontsize=7, clip_on=False,
        )  # fmt: skip
    axes.set_yticks(range(len(wanted)), [n.replace("_", " ") for n in reversed(wanted)])
    axes.axvline(0.5, color="black", lw=0.8, ls=":")
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy on targets")
    return fig


def kl_bars(kl: Sequence[float]) -> Figure:
    """KL of every latent dimension, largest first."""
    fig, axes = figure(5.4, 2.8)
    axes.bar(range(len(kl)), sorted(kl, reverse=True), color=COLOURS[0])
    axes.set_xlabel("latent dimension, sorted")
    axes.set_ylabel("KL from N(0, 1) (nats)")
    return fig


def calibration(probability: Sequence[float], bins: int = 10) -> Figure:
    """Accuracy against confidence; the area of a mark is the share of pairs in its bin."""
    p = np.asarray(probability)
    confidence = np.maximum(p, 1 - p)
    correct = (p > 0.5) + 0.5 * (p == 0.5)
    index = np.clip(((confidence - 0.5) * 2 * bins).astype(int), 0, bins - 1)
    fig, axes = figure(4.2, 3.6)
    axes.plot([0.5, 1], [0.5, 1], color=GREY, lw=0.8, ls=":")
    for b in range(bins):
        mine = index == b
        if mine.any():
            axes.scatter(
                confidence[mine].mean(),
                correct[mine].mean(),
                s=12 + 700 * mine.mean(),
                c=COLOURS[0],
                alpha=0.75,
            )
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(min(0.4, axes.get_ylim()[0]), 1.04)
    return fig


def communication(down: int, up: int, rounds: int) -> Figure:
    """Cumulative traffic of one client."""
    fig, axes = figure(5.4, 2.8)
    x = np.arange(rounds + 1)
    axes.plot(x, x * down / 1e6, color=COLOURS[0], label="to the client")
    axes.plot(x, x * up / 1e6, color=COLOURS[1], label="to the server")
    axes.set_xlabel("rounds taken part in")
    axes.set_ylabel("MB a client")
    axes.legend(fontsize=8, frameon=False)
    return fig
