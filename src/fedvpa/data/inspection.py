"""What a set of pairs holds: counts, lengths, groups, duplicates, and leaks between training and
test."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

from fedvpa.data.reading import PairSet
from fedvpa.records import PreferencePair


def inspect_pairs(source: PairSet, test: PairSet | None = None) -> dict[str, Any]:
    """Summary as plain values; lengths are medians, in words."""
    pairs = source.pairs
    contents = Counter(p.content_key() for p in pairs)
    # opposed groups, and different people, may well disagree: what one of them says twice counts
    answers: dict[tuple[str | None, str | None, str], set[str]] = {}
    for p in pairs:
        answers.setdefault((p.client_id, p.group, p.content_key()), set()).add(p.chosen)
    longer = [len(p.chosen.split()) - len(p.rejected.split()) for p in pairs]
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "prompts": len({p.prompt_key() for p in pairs}),
        "responses": len({text for p in pairs for text in (p.chosen, p.rejected)}),
        "clients": len({p.client_id for p in pairs if p.client_id is not None}),
        "pairs_per_client": _sizes(pairs),
        "without_client_id": sum(p.client_id is None for p in pairs),
        "groups": {
            name: _lengths([p for p in pairs if p.group == name])
            for name in sorted({p.group for p in pairs}, key=lambda g: (g is None, g or ""))
        },
        "duplicates": sum(n - 1 for n in contents.values()),
        "contradictions": sum(len(a) > 1 for a in answers.values()),
        "longer_is_chosen": round(
            sum(d > 0 for d in longer) / max(1, sum(d != 0 for d in longer)), 3
        ),
        "skipped": dict(source.skipped),
        "notes": source.notes,
        "examples": [_example(pairs[i]) for i in sorted({0, len(pairs) // 2, len(pairs) - 1})],
    }
    if test is not None:
        prompts = {p.prompt_key() for p in pairs}
        found["leaks"] = {
            "pairs": sum(p.content_key() in contents for p in test.pairs),
            "prompts": sum(p.prompt_key() in prompts for p in test.pairs),
        }
    return found


def _sizes(pairs: list[PreferencePair]) -> dict[str, int | float] | None:
    """Smallest, median and largest number of pairs per client id."""
    sizes = Counter(p.client_id for p in pairs if p.client_id is not None).values()
    if not sizes:
        return None
    return {"least": min(sizes), "median": median(sizes), "most": max(sizes)}


def _example(pair: PreferencePair) -> dict[str, Any]:
    """A record as it was understood, turn by turn."""
    return {
        "from": pair.source,
        "turns": [m._asdict() for m in pair.prompt],
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "client_id": pair.client_id,
        "group": pair.group,
    }


def _lengths(pairs: list[PreferencePair]) -> dict[str, int | float]:
    return {
        "pairs": len(pairs),
        "prompt_words": median(sum(len(m.content.split()) for m in p.prompt) for p in pairs),
        "chosen_words": median(len(p.chosen.split()) for p in pairs),
        "rejected_words": median(len(p.rejected.split()) for p in pairs),
    }
