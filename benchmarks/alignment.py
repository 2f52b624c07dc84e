"""What a policy aligned on personas does under each preference, by exact measures; no judge, no selector.

python -m benchmarks.alignment runs/policy --prompts prompts.txt --limit 48 --json FILE
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedvpa.alignment.policy import Sampling, load_policy
from fedvpa.alignment.prompts import read_prompts
from fedvpa.data.personas import ATTRIBUTES, measure
from fedvpa.evaluation.statistics import interval

POLES = {pole: (name, sign) for name, low, high in ATTRIBUTES for pole, sign in ((low, -1), (high, 1))}


def distinct_2(texts: Sequence[str]) -> float:
    """Share of different word pairs within a text, averaged over the texts."""
    shares = []
    for text in texts:
        words = text.lower().split()
        grams = list(pairwise(words))
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / max(1, len(shares))


def better(pole: str, texts: Sequence[str], others: Sequence[str]) -> list[float]:
    """For each prompt: 1 if the text is further towards the pole than the other one, 1/2 in a tie."""
    attribute, sign = POLES[pole]
    gaps = [sign * (measure(a)[attribute] - measure(b)[attribute]) for a, b in zip(texts, others)]
    return [1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps]


def main() -> None:
    """Generate under every preference and without one, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("policy", type=Path)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    policy, card = load_policy(arguments.policy)
    prompts = read_prompts(arguments.prompts, None, 1 << 20, lambda p: len(policy.prompt_ids(p))).some(arguments.limit, 0)
    sampling = Sampling(arguments.max_new_tokens, 0.7, 0.95, 32)
    texts: dict[str, list[str]] = {}
    tokens, began = 0, time.perf_counter()
    for name in ("base", *card.preferences):
        z = None if name == "base" else card.z(name).expand(len(prompts), -1)
        found = [""] * len(prompts)
        for batch in policy.sample(prompts, z, sampling, arguments.seed):
            tokens += batch.tokens
            for i, answer in zip(batch.rows, batch.texts):
                found[i] = answer
        texts[name] = found
    seconds = time.perf_counter() - began
    result: dict[str, Any] = {"prompts": len(prompts), "tokens_per_second": tokens / seconds, "asked": {}}
    for name, own in texts.items():
        measures = {a: interval([measure(t)[a] for t in own]) for a, _, _ in ATTRIBUTES}
        against = {pole: interval(better(pole, own, texts["base"])) for pole in POLES if name != "base"}
        result["asked"][name] = {
            "measures": measures, "closer_than_base": against, "distinct_2": distinct_2(own), "examples": own[:3],
        }  # fmt: skip
        shown = ", ".join(f"{a} {m['mean']:.2f}" for a, m in measures.items())
        print(f"{name:10s} {shown}, distinct-2 {distinct_2(own):.2f}")
    known = [name for name in card.preferences if name in POLES]
    print("share of prompts on which asking for the row is further towards the column than the base model:")
    for name in known:
        cells = [f"{pole} {result['asked'][name]['closer_than_base'][pole]['mean']:.2f}" for pole in known]
        print(f"{name:10s} {', '.join(cells)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
