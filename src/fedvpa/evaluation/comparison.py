"""Tables of a comparison: means over seeds with intervals, paired differences, closure; as CSV,
Markdown and one page."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from fedvpa.evaluation import plots
from fedvpa.evaluation.pages import render
from fedvpa.evaluation.statistics import Interval, interval, ratio_interval, share, show
from fedvpa.methods import METHODS

COLUMNS = (
    ("seen", "seen"), ("closure_seen", "closure, seen"), ("worst_group", "worst group, seen"),
    ("rarest_group", "rarest group, seen"), ("closure_rarest", "closure, rarest"), ("other_group",
    "other group's z, seen"),
    ("unseen", "unseen"), ("closure_unseen", "closure, unseen"), ("no_context",
    "unseen, no context"), ("ari", "ARI"),
    ("ece", "ECE"), ("nll", "NLL"), ("difference_seen", "minus reference, seen"),
    ("difference_unseen", "minus reference, unseen"), ("difference_no_context",
    "minus reference, no context"),
)  # fmt: skip
"""Key and heading of every column; one that is empty in all rows of a table is left out."""


@dataclass(frozen=True)
class Result:
    """One evaluated run: `found` is its eval.json; `run` names its directory if that holds a
    report."""

    setting: str
    row: str
    method: str
    seed: int
    found: dict[str, Any]
    run: str | None = None


def compared(
    setting: str, about: str, results: Sequence[Result], rows: Sequence[str]
) -> dict[str, Any]:
    """The table of one setting; the first row is the reference of the differences, which are paired
    by client and seed.

    Closure is (own - monolithic) / (oracle - monolithic), where monolithic is the better of the
    shared rewards.
    """
    by_row = {row: {r.seed: r.found for r in results if r.row == row} for row in rows}
    by_row = {row: found for row, found in by_row.items() if found}
    method = {r.row: r.method for r in results}
    oracle = next((row for row in by_row if METHODS[method[row]].role == "oracle"), None)
    reference = next(iter(by_row))
    table = []
    for row, found in by_row.items():
        line: dict[str, Any] = {
            "row": row,
            "seeds": len(found),
            "seconds": _mean([f["seconds"] for f in found.values()]),
        }
        for part in ("seen", "unseen", "no_context"):
            line[part] = _over_seeds([_clients(f, part) for f in found.values()], share)
            other = by_row[reference] if row != reference else {}
            line[f"difference_{part}"] = _difference(found, other, part)
        for part in ("seen", "unseen"):
            line[f"closure_{part}"] = _closure(
                by_row, method, row, oracle, lambda f, part=part: _seed_mean(f, part)
            )
        line |= _groups(by_row, method, row, oracle) | _figures(list(found.values()))
        table.append(line)
    return {"setting": setting, "about": about, "reference": reference, "rows": table}


def _difference(
    found: Mapping[int, Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]], part: str
) -> Interval | None:
    """Accuracy minus that of the reference, paired by client and seed."""
    shared = sorted(set(found) & set(reference))
    if not shared:
        return None
    pairs = [(_clients(found[s], part), _clients(reference[s], part)) for s in shared]
    return _over_seeds([[a - b for a, b in zip(own, other)] for own, other in pairs])


def _figures(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Further figures of a row: wrong group's z, ARI, ECE, NLL, collapsed runs."""
    swapped = [
        run["seen"]["accuracy"]["other_group"]["mean"]
        for run in runs
        if run["seen"] and "other_group" in run["seen"]["accuracy"]
    ]
    ari = [r["latent"]["ari"] for r in runs if r.get("latent", {}).get("ari") is not None]
    return {
        "other_group": share(swapped),
        "ari": interval(ari),
        "ece": interval([_number(run, "ece", "own") for run in runs]),
        "nll": interval([_number(run, "nll", "own", "mean") for run in runs]),
        "collapsed": sum(map(collapsed, runs)) if "latent" in runs[0] else None,
    }


def collapsed(found: Mapping[str, Any]) -> bool:
    """Whether z is not used: seen clients are served no better by their own z than by another
    group's, by 0.02 at least."""
    accuracy = (found["seen"] or found)["accuracy"]
    return (
        "other_group" in accuracy
        and accuracy["own"]["mean"] - accuracy["other_group"]["mean"] < 0.02
    )


def _clients(found: Mapping[str, Any], part: str) -> list[float]:
    if part == "seen":
        values = found["seen"]["per_client_accuracy"] if found["seen"] else []
    else:
        values = found["per_client_accuracy" if part == "unseen" else "per_client_without_context"]
    return [math.nan if v is None else v for v in values]


def _seed_mean(found: Mapping[str, Any], part: str) -> float:
    return interval(_clients(found, part))["mean"]


def _over_seeds(
    values: list[list[float]], summarise: Callable[[Sequence[float]], Interval] = interval
) -> Interval:
    """Interval over seeds of the clients' means: clients of one seed share a model, so they are not
    independent. With one seed there is nothing but the clients, and the interval is over them."""
    if len(values) == 1:
        return summarise(values[0])
    return summarise([interval(clients)["mean"] for clients in values])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _closure(
    by_row: Mapping[str, Mapping[int, Any]],
    method: Mapping[str, str],
    row: str,
    oracle: str | None,
    value: Any,
) -> Interval | None:
    baselines = [r for r in by_row if METHODS[method[r]].role == "monolithic"]
    if oracle is None or not baselines or row == oracle or row in baselines:
        return None

    def of(r: str) -> dict[int, float]:
        return {seed: value(found) for seed, found in by_row[r].items()}

    mono = max((of(r) for r in baselines), key=lambda v: _mean(list(v.values())))
    own, best = of(row), of(oracle)
    seeds = sorted(set(own) & set(mono) & set(best))
    if not seeds or any(math.isnan(v[s]) for v in (own, mono, best) for s in seeds):
        return None
    return ratio_interval([own[s] - mono[s] for s in seeds], [best[s] - mono[s] for s in seeds])


def _groups(
    by_row: Mapping[str, Mapping[int, Any]], method: Mapping[str, str], row: str, oracle: str | None
) -> dict[str, Interval | None]:
    """Accuracy in the group where it is lowest over the seeds, and in the one with the fewest
    clients if one has fewer."""
    every = [f["seen"]["accuracy"]["by_group"] for f in by_row[row].values() if f["seen"]]
    out: dict[str, Interval | None] = {
        "worst_group": None,
        "rarest_group": None,
        "closure_rarest": None,
    }
    names = [name for name in (every[0] if every else {}) if all(name in e for e in every)]
    if len(names) < 2:
        return out
    out["worst_group"] = min(
        (share([e[n]["mean"] for e in every]) for n in names), key=lambda v: v["mean"]
    )
    size = {n: every[0][n]["n"] for n in names}
    rarest = min(names, key=lambda n: size[n])
    if max(size.values()) > 1.25 * size[rarest]:
        out["rarest_group"] = share([e[rarest]["mean"] for e in every])
        out["closure_rarest"] = _closure(
            by_row, method, row, oracle, lambda f: f["seen"]["accuracy"]["by_group"][rarest]["mean"]
        )
    return out


def as_csv(results: Sequence[Result]) -> str:
    """One CSV line per run."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    few = sorted({int(n) for r in results for n in r.found["few_shot"]})
    writer.writerow(
        ["setting", "row", "method", "seed", "seen", "seen_worst_group", "seen_other_group",
        "unseen", "unseen_worst_group",
         "unseen_other_group", "ari", "ari_inferred", "components", "active_units", "coverage_90",
         "leaking_single_pair", "nll",
         "ece", "weight_entropy", "weight_same_group", "corrupted_auc_nll", "seconds",
         *(f"context_{n}" for n in few),
         *(f"nll_{n}" for n in few), *(f"ece_{n}" for n in few)]
    )  # fmt: skip
    for r in results:
        f, latent, posterior = r.found, r.found.get("latent", {}), r.found.get("posterior", {})
        seen: dict[str, Any] = f["seen"]["accuracy"] if f["seen"] else {}
        shots = [f["few_shot"].get(str(n)) for n in few]
        values = [
            _at(seen, "own", "mean"), _at(seen, "worst_group", "mean"), _at(seen, "other_group",
            "mean"),
            _at(f, "accuracy", "own", "mean"), _at(f, "accuracy", "worst_group", "mean"),
            _at(f, "accuracy", "other_group", "mean"),
            latent.get("ari"), _at(latent, "inferred", "ari"), latent.get("population_components"),
            posterior.get("active_units"), posterior.get("coverage_90"),
            f.get("leaking_single_pair_accuracy"),
            _at(f, "nll", "own", "mean"), _at(f, "ece", "own"), _at(f, "prior_weights", "entropy"),
            _at(f, "prior_weights", "same_group_weight"), _at(f, "corrupted", "nll", "auc"),
            f["seconds"],
            *(_at(s, "accuracy", "mean") for s in shots), *(_at(s, "nll", "mean") for s in shots),
            *(_at(s, "ece") for s in shots),
        ]  # fmt: skip
        shown = ["" if v is None else str(v) if isinstance(v, int) else f"{v:.4f}" for v in values]
        writer.writerow([r.setting, r.row, r.method, r.seed, *shown])
    return out.getvalue()


def _number(tree: Any, *path: str) -> float:
    found = _at(tree, *path)
    return math.nan if found is None else float(found)


def _at(tree: Any, *path: str) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def as_markdown(tables: Sequence[Mapping[str, Any]]) -> str:
    """The tables, with what the columns mean."""
    lines = [
        (
            "Accuracy on target pairs that are disjoint from every context and from training; mean"
            " [95 % interval] over seeds"
        ),
        (
            "(with one seed: over clients). Differences are paired by client and seed. Closure:"
            " (own - monolithic) /"
        ),
        (
            "(oracle-group - monolithic), monolithic being the better of the shared rewards. A seed"
            " counts as collapsed if seen"
        ),
        (
            "clients' own z is less than 0.02 better than another group's. ECE, NLL: unseen"
            " clients, full context."
        ),
    ]
    for table in tables:
        columns = shown_columns(table)
        title = table["setting"] or "comparison"
        lines += ["", f"## {title}", ""]
        lines += [
            f"{table['about']} " * bool(table["about"])
            + f"At most {table['context']} context pairs of unseen clients."
        ]
        lines += [
            "",
            "| | " + " | ".join(name for _, name in columns) + " | collapsed |",
            "|---" * (len(columns) + 2) + "|",
        ]
        for r in table["rows"]:
            count = "-" if r["collapsed"] is None else f"{r['collapsed']} of {r['seeds']}"
            lines.append(
                f"| {r['row']} | "
                + " | ".join(show(r[key]) for key, _ in columns)
                + f" | {count} |"
            )
        if repeated := same_rows(table):
            lines += ["", repeated]
    return "\n".join(lines) + "\n"


def same_rows(table: Mapping[str, Any]) -> str:
    """Which rows repeat the one that they are equal to, in all figures."""
    first: dict[tuple[str, ...], str] = {}
    said = []
    for row in table["rows"]:
        figures = tuple(show(row[key], 9) for key, _ in COLUMNS if not key.startswith("difference"))
        before = first.setdefault(figures, row["row"])
        if before != row["row"]:
            said.append(f"{row['row']} is {before}, figure by figure")
    return f"The same: {'; '.join(said)}." if said else ""


def shown_columns(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The columns that hold something in some row."""
    return [
        (key, name) for key, name in COLUMNS if any(show(row[key]) != "-" for row in table["rows"])
    ]


def render_comparison(
    tables: Sequence[Mapping[str, Any]], results: Sequence[Result], maps: Mapping[str, str]
) -> str:
    """One page: a section a setting with its table, few-shot curves and the reference's latent map
    (`maps`, by run), and how far every seed's latent finds the groups."""
    sections = []
    for table in tables:
        here = [r for r in results if r.setting == table["setting"]]
        columns = shown_columns(table)
        latent = next((r.run for r in here if r.row == table["reference"] and r.run in maps), None)
        sections.append(
            {
                **table,
                "columns": [name for _, name in columns],
                "same": same_rows(table),
                "cells": [[show(row[key]) for key, _ in columns] for row in table["rows"]],
                "few_shot": plots.svg(_few_shot(here, [row["row"] for row in table["rows"]])),
                "map": maps.get(latent, "") if latent else "",
                "runs": [r.run for r in here if r.run],
            }
        )
    collapse = plots.svg(_collapse(results)) if any(_found_groups(r) for r in results) else ""
    return render("fedvpa.evaluation", "comparison.html", sections=sections, collapse=collapse)


def _few_shot(results: Sequence[Result], rows: Sequence[str]) -> Figure:
    fig, axes = plots.figure(7.2, 3.8)
    for i, row in enumerate(rows):
        found = [
            r.found["few_shot"] or r.found["seen"]["few_shot"] for r in results if r.row == row
        ]
        sizes = list(found[0])
        means = [_mean([f[s]["accuracy"]["mean"] for f in found]) for s in sizes]
        style = "-" if i < len(plots.COLOURS) else "--"
        axes.plot(
            range(len(sizes)),
            means,
            style,
            marker="o",
            ms=4,
            color=plots.COLOURS[i % len(plots.COLOURS)],
            label=plots.label(row),
        )
        axes.set_xticks(range(len(sizes)), sizes)
    axes.axhline(0.5, color=plots.GREY, lw=0.8, ls=":")
    axes.set_xlabel("context pairs")
    axes.set_ylabel("accuracy on disjoint targets")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def _found_groups(result: Result) -> bool:
    return _at(result.found, "latent", "ari") is not None


def _collapse(results: Sequence[Result]) -> Figure:
    """A dot a seed: ARI of the seen clients' posterior means with the true groups, and own minus
    other group's z."""
    usable = [r for r in results if _found_groups(r)]
    labels = list(dict.fromkeys((r.setting, r.row) for r in usable))
    fig = Figure(figsize=(8.4, 0.9 + 0.2 * len(labels)), layout="constrained")
    left, right = fig.subplots(1, 2, sharey=True)
    for y, label in enumerate(labels):
        runs = [r for r in usable if (r.setting, r.row) == label]
        gap = [
            r.found["seen"]["accuracy"] if r.found["seen"] else r.found["accuracy"] for r in runs
        ]
        apart = [g["own"]["mean"] - g["other_group"]["mean"] for g in gap if "other_group" in g]
        for axes, values in ((left, [r.found["latent"]["ari"] for r in runs]), (right, apart)):
            axes.scatter(values, [y] * len(values), s=16, color=plots.COLOURS[0], alpha=0.6, lw=0)
    for axes, name in (
        (left, "ARI of the clients' means, a dot a seed"),
        (right, "own z minus another group's z, seen"),
    ):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.axvline(0, color=plots.GREY, lw=0.8, ls=":")
        axes.set_xlabel(name)
        axes.tick_params(labeltop=True)
    left.set_yticks(
        range(len(labels)),
        [plots.label(" · ".join(part for part in label if part)) for label in labels],
        fontsize=7,
    )
    left.set_ylim(len(labels) - 0.4, -0.6)
    return fig
