"""The page that compares methods."""

from __future__ import annotations

import math
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.figure import Figure

from fedvpa.evaluation import plots


def render_comparison(table: dict[str, Any], found: dict[tuple[str, int], Any]) -> str:
    """HTML for the rows of `table`; `found` holds the results of every (method, seed)."""
    methods = [row["method"] for row in table["rows"]]
    by_method = {m: [r for (name, _), r in found.items() if name == m] for m in methods}
    latent = [
        {
            "method": m,
            "active": ", ".join(str(r["posterior"]["active_units"]) for r in by_method[m]),
            "ari": ", ".join("-" if r["latent"]["ari"] is None else f"{r['latent']['ari']:.2f}" for r in by_method[m]),
        }
        for m in methods
        if "posterior" in by_method[m][0]
    ]
    keys = ("seen", "unseen", "worst_group", "other_group", "difference")
    environment = Environment(loader=PackageLoader("fedvpa.evaluation", "."), autoescape=select_autoescape())
    return environment.get_template("comparison.html").render(
        rows=[{"method": r["method"], "cells": [_cell(r[k]) for k in keys]} for r in table["rows"]],
        reference=table["reference"],
        seeds=table["seeds"],
        context=table["context"],
        few_shot=plots.svg(_few_shot(by_method)),
        latent=latent,
        runs=[f"{m}-seed{s}" for m, s in found],
    )


def _cell(value: dict[str, Any] | None) -> str:
    if value is None or not value["n"] or math.isnan(value["mean"]):
        return "-"
    spread = "" if math.isnan(value["low"]) else f" [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value['mean']:.3f}{spread}"


def _few_shot(by_method: dict[str, list[dict[str, Any]]]) -> Figure:
    fig, axes = plots.figure(6.4, 3.8)
    for i, (method, results) in enumerate(by_method.items()):
        sizes = list(results[0]["few_shot"])
        means = [sum(r["few_shot"][s]["accuracy"]["mean"] for r in results) / len(results) for s in sizes]
        axes.plot(range(len(sizes)), means, marker="o", ms=4, color=plots.COLOURS[i % len(plots.COLOURS)], label=method)
        axes.set_xticks(range(len(sizes)), sizes)
    axes.axhline(0.5, color=plots.GREY, lw=0.8, ls=":")
    axes.set_xlabel("context pairs")
    axes.set_ylabel("accuracy on disjoint targets")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig
