"""Draws docs/images/latent_map.svg from a run: python tools/draw_latent_map.py RUN DATA SPLIT."""

from __future__ import annotations

import sys
from pathlib import Path

from fedvpa import evaluate
from fedvpa.evaluation import plots

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "latent_map.svg"


def main(run: str, data: str, split: str) -> None:
    """Posteriors of the training clients and of ten unseen ones, by true group."""
    found = evaluate(run, data, split=split, progress=False)
    assert found.seen is not None
    figure = plots.latent_map(
        found.seen, found.unseen, found.prototypes, found.seen_group, found.unseen_group,
        found.group_names,
    )  # fmt: skip
    IMAGE.parent.mkdir(exist_ok=True)
    IMAGE.write_text(plots.svg(figure))


if __name__ == "__main__":
    main(*sys.argv[1:])
