"""Tokens a second of the feature extraction, against encoding prompt + response for each response,
padded to the longest.

    python -m benchmarks.features --data DIR [--split train] [--pairs 64]

Both run the same layers of the same model on the same pairs, in batches of at most the same number
of padded tokens; plain batches are formed in the order of the file, as a loader without bucketing
would. Speed counts the tokens of prompt + response for every response, so that reading a prompt
once shows as speed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import torch

from fedvpa.config import FeaturesConfig
from fedvpa.data.reading import read_pairs
from fedvpa.features.backbone import Backbone, Tap
from fedvpa.records import Item


def main(argv: list[str] | None = None) -> int:
    """Print both speeds and their ratio."""
    parser = argparse.ArgumentParser(description="Tokens a second of feature extraction.")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--backbone", default="smollm2")
    parser.add_argument("--layer", type=int, default=FeaturesConfig().layer)
    arguments = parser.parse_args(argv)
    pairs = read_pairs(arguments.data, arguments.split).pairs
    pairs = random.Random(0).sample(pairs, min(arguments.pairs, len(pairs)))
    items = [Item(p.prompt, r) for p in pairs for r in (p.chosen, p.rejected)]
    backbone, tap = Backbone(arguments.backbone), Tap(arguments.layer, "mean")
    tokens = sum(len(one.prompt) + len(one.reply) for one in backbone.prepare(items))
    backbone.encode(items[:4], [tap])

    start = time.perf_counter()
    ours = backbone.encode(items, [tap])
    fast = tokens / (time.perf_counter() - start)
    start = time.perf_counter()
    plain = encode_plainly(backbone, items, tap)
    slow = tokens / (time.perf_counter() - start)
    gap = float((ours - plain).abs().max() / plain.abs().max())
    print(f"{len(pairs)} pairs, {tokens} tokens of prompt + response, {backbone.dtype}")
    print(
        f"plain {slow:,.0f} tokens/s, fedvpa {fast:,.0f} tokens/s, ratio {fast / slow:.2f}, largest"
        f" relative gap {gap:.1e}"
    )
    return 0


def encode_plainly(backbone: Backbone, items: list[Item], tap: Tap, batch: int = 8) -> torch.Tensor:
    """Every response in a row of its own, behind its prompt; rows of a batch padded to the
    longest."""
    packed, backbone.packed = backbone.packed, False
    try:
        parts = [
            backbone.encode(items[i : i + batch], [tap], token_budget=1 << 30)[:, 0]
            for i in range(0, len(items), batch)
        ]
    finally:
        backbone.packed = packed
    return torch.cat(parts).unsqueeze(1)


if __name__ == "__main__":
    sys.exit(main())
