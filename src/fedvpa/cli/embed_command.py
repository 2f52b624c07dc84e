"""``fedvpa embed``."""

from __future__ import annotations

import argparse

from fedvpa.console import Reporter, emit_json
from fedvpa.experiment.dataset import training_data
from fedvpa.features.cache import FeatureCache


def run_embed(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Fill the feature cache for what `train` would read with the same settings."""
    config = arguments.built
    data = training_data(config)
    pairs = [p for client in (*data.train, *data.validation) for p in client.pairs]
    speed = [0.0]
    with reporter.texts() as show:

        def progress(done: int, total: int, tokens_per_second: float) -> None:
            speed[0] = tokens_per_second
            show(done, total, tokens_per_second)

        table = FeatureCache(config.features).pairs(pairs, progress)
    done = {
        "pairs": len(pairs), "texts_computed": table.computed, "width": table.values.shape[-1],
        "backbone": table.backbone, "signature": table.signature,
        "tokens_per_second": speed[0] or None,
    }  # fmt: skip
    reporter.say(
        f"{len(pairs)} pairs by {table.backbone}: {table.computed} texts computed, the rest was"
        " cached"
    )
    emit_json(arguments.json, done)
    return 0
