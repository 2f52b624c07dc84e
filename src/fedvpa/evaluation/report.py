"""The HTML report: one file, no scripts, nothing fetched."""

from __future__ import annotations

import math
from typing import Any

import yaml
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor

from fedvpa.evaluation import plots
from fedvpa.evaluation.pages import render
from fedvpa.evaluation.statistics import show, told_apart
from fedvpa.evaluation.verdict import found_structure
from fedvpa.types import Posterior

_ROWS = (
    ("own", "own z"),
    ("worst_group", "own z, worst group"),
    ("shared", "a shared reward, trained beside"),
    ("prior_mean", "prior mean (nothing known)"),
    ("shuffled", "another client's z"),
    ("other_group", "another group's z"),
    ("flipped", "context labels reversed"),
)


_LATENT_MAP = (
    "Latent map: posteriors by true group, with one-sigma ellipses; unseen clients from their"
    " context alone."
)


def render_report(
    results: dict[str, Any],
    *,
    seen: Posterior | None,
    unseen: Posterior | None,
    prototypes: Tensor | None,
    group_names: list[str],
    seen_group: Int[Tensor, "k"],
    unseen_group: Int[Tensor, "u"],
    probability: list[float],
) -> str:
    """The page for `results` (see docs/evaluation.md for its keys)."""
    run, data, protocol = results["run"], results["data"], results["protocol"]
    who, part = ("unseen", results) if results["accuracy"] else ("seen", results["seen"])
    figures = [
        (f"Own z against the controls ({who} clients).", plots.controls(part["accuracy"])),
        (f"Few-shot curve, {who} clients; the band is a 95 % interval over clients.",
         plots.few_shot_curve(part["few_shot"], group_names)),
    ]  # fmt: skip
    if seen is not None:
        drawn = plots.latent_map(seen, unseen, prototypes, seen_group, unseen_group, group_names)
        figures.append((_LATENT_MAP, drawn))
    figures += _further_figures(results, probability, who)
    columns = [("unseen clients", results)] if results["accuracy"] else []
    columns += [("seen clients", results["seen"])] if results["seen"] else []
    return render(
        "fedvpa.evaluation",
        "report.html",
        title=f"fedvpa: {run['method']} on {data['source'].rstrip('/').rsplit('/', 1)[-1]}",
        lead=(
            f"{run['clients']} training clients, {run['rounds']} rounds, seed {run['seed']};"
            f" evaluated on {data['unseen_clients']} unseen clients with up to"
            f" {protocol['context']} context pairs ({protocol['repeats']} random divisions into"
            " context and disjoint targets)."
        ),
        warnings=_warnings(results),
        cards=_cards(results),
        columns=[name for name, _ in columns],
        rows=_rows(columns),
        verdict=[said["sentence"] for said in results["verdict"].values()],
        structure=found_structure(results["structure"]) if results["structure"] else "",
        judged=_judged(results["structure"]),
        overlap=_overlap(columns),
        plots=[{"svg": plots.svg(fig), "caption": caption} for caption, fig in figures],
        diagnostics=_diagnostics(results),
        manifest=results["communication"]["manifest"],
        config=yaml.safe_dump(run["config"], sort_keys=False),
    )


def _further_figures(
    results: dict[str, Any], probability: list[float], who: str
) -> list[tuple[str, Figure]]:
    figures = []
    if any("loss" in row for row in results["history"]):
        figures.append(("Learning curves.", plots.learning_curves(results["history"])))
    if "posterior" in results:
        bars = plots.kl_bars(results["posterior"]["kl_per_dimension"])
        figures.append(("KL per dimension, mean over seen clients.", bars))
    figures.append((f"Calibration on {who} clients' targets.", plots.calibration(probability)))
    traffic = results["communication"]
    down, up = traffic["down_bytes_per_client_and_round"], traffic["up_bytes_per_client_and_round"]
    drawn = plots.communication(down, up, results["run"]["rounds"])
    return [*figures, ("Communication of one client.", drawn)]


def _warnings(results: dict[str, Any]) -> list[str]:
    found = []
    if results["protocol"]["training_leaks"]:
        found.append(
            "Trained with the single-pair protocol, which LEAKS: z was inferred from the very pair "
            "that was scored. The evaluation here does not."
        )
    part = results if results["accuracy"] else results["seen"]
    if "prior_mean" not in told_apart(part["accuracy"]):
        found.append(
            "Every user is predicted alike, whatever is known of them: other states than one's own"
            " give the same figures, and are not shown."
        )
    dropped = results["data"]["dropped_because_trained_on"]
    if dropped:
        found.append(f"{dropped} evaluation pairs were dropped: the run was trained on them.")
    if results["data"]["held_out_pairs_by"] == "group" and results["seen"]:
        found.append(
            "The training clients were made by group, and so were the held-out pairs of 'seen'"
            " clients dealt to them: by group, not by person."
        )
    skipped = results["data"]["skipped"]
    found += [f"{count} records were skipped: {reason}." for reason, count in skipped.items()]
    found += results["data"]["notes"]
    found += [f"{count} texts: {what}." for what, count in results["data"]["texts"].items()]
    return found


def _rows(columns: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    parts = [part for _, part in columns]
    apart = told_apart(*(part["accuracy"] for part in parts))
    rows = [
        {"name": label, "cells": [_cell(part["accuracy"].get(key)) for part in parts]}
        for key, label in _ROWS
        if key in apart
    ]
    rows.append({"name": "ECE, own z", "cells": [f"{part['ece']['own']:.3f}" for part in parts]})
    nll = [_cell(part["nll"]["own"]) for part in parts]
    return [*rows, {"name": "NLL, own z (nats per pair)", "cells": nll}]


def _judged(structure: dict[str, Any] | None) -> list[list[str]]:
    """Structures that were judged last, on contents that neither parameters nor context had
    seen."""
    rows = []
    for row in (structure or {}).get("judged", []):
        name = "one shared reward" if row["kind"] == "shared" else f"{row['order']} {row['kind']}"
        rows.append([
            name + " (served)" * row["picked"], f"{row['ridge']:g}", f"{row['width']:.2g}",
            f"{row['nll']:.4f}", "-" if row["picked"] else f"{row['error']:.4f}",
            f"{row['accuracy']:.3f}",
        ])  # fmt: skip
    return rows


def _overlap(columns: list[tuple[str, dict[str, Any]]]) -> list[list[str]]:
    """Targets by how many of their responses the user had judged before."""
    rows = []
    for name, part in columns:
        for count, row in part["by_overlap"].items():
            if not row["targets"]:
                continue
            own, prior = row["own"], row["prior_mean"]
            rows.append([
                name, count, f"{row['share']:.0%}", f"{own['accuracy']:.3f} / {own['nll']:.3f}",
                f"{prior['accuracy']:.3f} / {prior['nll']:.3f}",
            ])  # fmt: skip
    return rows


def _cell(value: dict[str, Any] | None) -> str:
    group = f" ({value['group']})" if value and value.get("group") else ""
    return show(value) + group


def _cards(results: dict[str, Any]) -> list[dict[str, str]]:
    def card(label: str, value: dict[str, Any]) -> dict[str, str]:
        detail = (
            "" if math.isnan(value["low"]) else f"95 %: {value['low']:.3f} to {value['high']:.3f}"
        )
        return {"label": label, "value": f"{value['mean']:.3f}", "detail": detail}

    cards = []
    if results["accuracy"]:
        cards.append(card("own z, unseen", results["accuracy"]["own"]))
    if "other_group" in results["accuracy"]:
        cards.append(card("another group's z", results["accuracy"]["other_group"]))
    if results["seen"]:
        cards.append(card("own z, seen", results["seen"]["accuracy"]["own"]))
    if "latent" in results and results["latent"]["ari"] is not None:
        cards.append(
            {
                "label": "ARI, seen clients",
                "value": f"{results['latent']['ari']:.2f}",
                "detail": "k-means on means",
            }
        )
    if "privacy" in results:
        spent = results["privacy"]
        cards.append(
            {
                "label": "epsilon, a client",
                "value": f"{spent['epsilon']:.2f}",
                "detail": f"delta {spent['delta']:g}",
            }
        )
    if "posterior" in results:
        p = results["posterior"]
        cards.append(
            {
                "label": "active units",
                "value": str(p["active_units"]),
                "detail": f"of {p['dimensions']}",
            }
        )
    return cards


def _diagnostics(results: dict[str, Any]) -> list[tuple[str, str]]:
    if "posterior" not in results:
        return []
    p, latent = results["posterior"], results["latent"]
    entries: list[tuple[str, Any]] = [
        ("active units", p["active_units"]),
        ("KL from N(0, I), nats", p["kl"]),
        ("mutual information of client and z, nats", p["mutual_information"]),
        ("mean sigma", p["mean_sigma"]),
        ("ARI / NMI of k-means with the true groups (seen)", _pair(latent["ari"], latent["nmi"])),
        ("the same, z as inferred", _pair(latent["inferred"]["ari"], latent["inferred"]["nmi"])),
        (
            "the same, unseen clients' contexts",
            _pair(latent["unseen"]["ari"], latent["unseen"]["nmi"]),
        ),
        ("silhouette", latent["silhouette"]),
        ("between- / within-group variance", latent["between_within"]),
        ("linear probe of the group", latent["linear_probe"]),
        ("choices that another group's z reverses", latent["switch_rate"]["all"]),
        ("fitted components", latent["population_components"]),
    ]
    if results.get("prior_weights"):
        w = results["prior_weights"]
        entries.append(("entropy of the prior's weights (1: uniform)", w["entropy"]))
        entries.append(
            (
                "weight on peers of one's own group / their share",
                _pair(w["same_group_weight"], w["same_group_share_of_peers"]),
            )
        )
    return [
        (name, f"{value:.3f}" if isinstance(value, float) else str(value))
        for name, value in entries
        if value is not None
    ]


def _pair(first: float | None, second: float | None) -> str | None:
    return None if first is None or second is None else f"{first:.2f} / {second:.2f}"
