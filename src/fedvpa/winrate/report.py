"""The page of `fedvpa winrate`: one file, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedvpa.evaluation import plots
from fedvpa.evaluation.pages import render
from fedvpa.evaluation.statistics import show


def render_winrate(results: Mapping[str, Any]) -> str:
    """The page for what `winrate` returned (see docs/alignment.md for its keys)."""
    arms = [arm["name"] for arm in results["arms"]]
    judges = [_judge(name, found, arms) for name, found in results["judges"].items()]
    groups = ", ".join(
        f"{n} of {name}" for name, n in results["prompt_groups"].items() if name != "all"
    )
    count = sum(results["prompt_groups"].values())
    sampling = results["sampling"]
    lead = (
        f"{count} prompts from {results['prompts'].rstrip('/').rsplit('/', 1)[-1]}"
        + (f", split {results['split']}" if results["split"] else "")
        + (f" ({groups})" if groups else "")
        + f"; one response of each arm to each, at most {sampling['max_new_tokens']} tokens,"
        f" temperature {sampling['temperature']}, top-p {sampling['top_p']}, seed"
        f" {results['seed']}. Intervals: 95 %, over prompts: bootstrap (win rates), Student t"
        " (texts)."
    )
    return render(
        "fedvpa.winrate",
        "winrate.html",
        title=f"fedvpa: win rates of {results['policy'].rstrip('/').rsplit('/', 1)[-1]}",
        lead=lead,
        warnings=_warnings(results),
        judges=judges,
        texts=_texts(results),
        plot=plots.svg(_words(results)),
        mixes=_mixes(results["mixes"]) if results.get("mixes") else None,
        arms=arms,
        samples=results["samples"],
    )


def _warnings(results: Mapping[str, Any]) -> list[str]:
    out = [
        f"Judge '{name}' failed; its figures are missing: {found['error']}"
        for name, found in results["judges"].items()
        if "error" in found
    ]
    cut = {
        name: found["at_limit"]
        for name, found in results["texts"].items()
        if found["at_limit"] > 0.2
    }
    if cut:
        shown = ", ".join(f"{name} {share:.0%}" for name, share in cut.items())
        out.append(
            f"The limit ended many responses ({shown}): their numbers of words are lower bounds."
        )
    return out


def _judge(name: str, found: Mapping[str, Any], arms: Sequence[str]) -> dict[str, Any]:
    against = found.get("against_base", {})
    criteria = list(against)
    return {
        "name": name,
        "about": found["about"],
        "criteria": criteria,
        "rows": [
            (arm, [_shaded(against[c].get(arm), found, c) for c in criteria]) for arm in arms
            if any(arm in against[c] for c in criteria)
        ],
        "head": [
            (criterion, other, show(row["win_rate"], 2), row["ties"],
            show(row.get("length_controlled"), 2))
            for criterion, others in found.get("own_against", {}).items()
            for other, row in others.items()
        ],
        "diagonal": found.get("diagonal_dominant"),
        "differences": [
            (criterion, other, show(row, 2))
            for criterion, others in found.get("diagonal_minus_other", {}).items()
            for other, row in others.items()
        ],
    }  # fmt: skip


def _shaded(
    row: Mapping[str, Any] | None, found: Mapping[str, Any], criterion: str
) -> tuple[str, str, str]:
    """Text of a cell, its length-controlled line, and its colour: blue above one half, orange
    below, by distance from it."""
    if row is None:
        return "-", "", "transparent"
    mean = row["win_rate"]["mean"]
    colour = "0, 114, 178" if mean > 0.5 else "213, 94, 0"
    return (
        show(row["win_rate"], 2),
        show(row.get("length_controlled"), 2),
        f"rgba({colour}, {min(0.5, abs(mean - 0.5)):.2f})",
    )


def _texts(results: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    return [
        (name, [show(t["words"], 0), f"{t['at_limit']:.0%}", show(t["distinct_1"], 2),
        show(t["distinct_2"], 2),
                show(t["repetition_4"], 2), show(t["kl_per_token"], 3), f"{t['perplexity']:.1f}"])
        for name, t in results["texts"].items()
    ]  # fmt: skip


def _words(results: Mapping[str, Any]) -> Figure:
    names = list(results["texts"])
    fig, axes = plots.figure(6.4, 0.9 + 0.34 * len(names))
    for i, name in enumerate(reversed(names)):
        value = results["texts"][name]["words"]
        axes.barh(
            i, value["mean"], color=plots.GREY if name == "base" else plots.COLOURS[0], height=0.62
        )
        axes.plot([value["low"], value["high"]], [i, i], color="black", lw=1.2)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel("words of a response")
    return fig


def _mixes(found: Mapping[str, Any]) -> dict[str, Any]:
    names, means = found["arms"], found["means"]
    fig, axes = plots.figure(6.4, 3.2)
    axes.plot(np.arange(len(names)), means["length"], marker="o", color=plots.COLOURS[0])
    axes.set_xticks(np.arange(len(names)), [name.replace(",", "\n") for name in names], fontsize=7)
    axes.margins(x=0.15)
    axes.set_ylabel("words of a response")
    rows = [
        (attribute, [f"{v:.2f}" for v in values], found["monotone"][attribute])
        for attribute, values in means.items()
    ]
    return {"arms": names, "rows": rows, "plot": plots.svg(fig)}
