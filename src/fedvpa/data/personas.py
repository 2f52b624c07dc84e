"""`personas`: users with known preference vectors, over responses that differ in measurable
attributes.

A response is written from attributes a in {-1, +1}^5 (length, tone, stance, layout, engagement):
which of a topic's points are made and how they are worded. A user's utility is u(y) = v . a(y); v
is its group's vector plus a personal scatter, and the preferred response is the one of higher
utility, but for a share of flipped labels. All groups see pairs of one and the same distribution.
Groups 2k and 2k+1 want opposite things, above all in attribute k.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import product

import numpy as np
import yaml
from numpy.typing import NDArray

from fedvpa.config import PersonasConfig
from fedvpa.data.partition import ClientPairs
from fedvpa.errors import BadInputError
from fedvpa.records import Message, PreferencePair

ATTRIBUTES: tuple[tuple[str, str, str], ...] = (
    ("length", "concise", "detailed"),
    ("tone", "formal", "warm"),
    ("stance", "direct", "cautious"),
    ("layout", "prose", "bullets"),
    ("engagement", "stating", "asking"),
)
"""Name, pole at -1, pole at +1."""

CANDIDATES = 8
"""Responses to each prompt."""

UNSEEN = 1_000_000
"""Users from this index on are never trained on."""

_MAIN, _MINOR = 2.0, 0.5
_SIGNS = np.array(
    [[0, 1, -1, 1, 1], [-1, 0, 1, 1, -1], [1, 1, 0, -1, 1], [1, -1, -1, 0, -1], [-1, 1, 1, -1, 0]],
    dtype=float,
)


@dataclass(frozen=True)
class _Phrases:
    framings: list[str]
    topics: dict[str, list[list[str]]]
    styles: dict[str, list[str]]


@cache
def _phrases() -> _Phrases:
    text = resources.files("fedvpa.data").joinpath("personas.yaml").read_text(encoding="utf-8")
    return _Phrases(**yaml.safe_load(text))


def prompts(split: str | None = None) -> list[str]:
    """All prompts, in a fixed order; or those of ``test``, or of any other split: no prompt is in
    both."""
    phrases = _phrases()
    every = [
        framing.format(topic=topic) for topic in phrases.topics for framing in phrases.framings
    ]
    return [
        prompt
        for i, prompt in enumerate(every)
        if split is None or (i % 4 == 3) == (split == "test")
    ]


def group_names(groups: int) -> list[str]:
    """Name of each group: the pole it cares for most.

    Raises:
        BadInputError: more groups than poles.
    """
    poles = [pole for _, low, high in ATTRIBUTES for pole in (low, high)]
    if not 1 <= groups <= len(poles):
        raise BadInputError(f"data.personas.groups: {groups} is not between 1 and {len(poles)}")
    return poles[:groups]


def group_vectors(groups: int) -> NDArray[np.float64]:
    """True preference vectors [groups, 5]: 2 on a group's own attribute, 1/2 on the others; 2k and
    2k+1 are opposed."""
    group_names(groups)
    base = _MAIN * np.eye(len(ATTRIBUTES)) + _MINOR * _SIGNS
    return np.array([(-base if m % 2 == 0 else base)[m // 2] for m in range(groups)])


def user_vector(settings: PersonasConfig, user: int, seed: int) -> tuple[int, NDArray[np.float64]]:
    """Group and true preference vector of a user; the same whenever it is asked for."""
    group = user % settings.groups
    scatter = np.random.default_rng([seed, 11, user]).normal(size=len(ATTRIBUTES))
    return group, group_vectors(settings.groups)[group] + settings.spread * scatter


def personas(
    settings: PersonasConfig,
    users: Sequence[int],
    seed: int,
    split: str = "train",
    pairs: int | None = None,
) -> list[ClientPairs]:
    """Comparisons of the given users, each of two of a prompt's `CANDIDATES` responses.

    `split` names an independent draw for the same users; no prompt of ``test`` is ever one of
    ``train``.

    Raises:
        BadInputError: more comparisons per user than half of all there are, or more groups than
            poles.
    """
    names = group_names(settings.groups)
    bank = prompts(split)
    wanted, most = pairs or settings.pairs, len(bank) * CANDIDATES * (CANDIDATES - 1) // 4
    if wanted > most:
        raise BadInputError(
            f"personas: at most {most} comparisons per user in '{split}', not {wanted}"
        )
    out = []
    for user in users:
        group, vector = user_vector(settings, user, seed)
        generator = np.random.default_rng([seed, 13, user, *split.encode()])
        own: dict[str, PreferencePair] = {}
        while len(own) < wanted:
            pair = _compare(
                vector, bank, settings.noise, generator, f"user-{user:04d}", names[group]
            )
            own.setdefault(pair.content_key(), pair)
        out.append(ClientPairs(f"user-{user:04d}", names[group], tuple(own.values())))
    return out


@cache
def candidates(prompt: str) -> list[tuple[NDArray[np.int_], str]]:
    """The responses that users of any seed choose from, with their attributes: distinct, and the
    same whenever asked for, so that their features are computed once for all experiments.

    Raises:
        BadInputError: not one of the generator's prompts.
    """
    generator = np.random.default_rng([17, *prompt.encode()])
    kinds = np.array(list(product((-1, 1), repeat=len(ATTRIBUTES))))
    return [
        (kind, respond(prompt, kind, generator))
        for kind in generator.permutation(kinds)[:CANDIDATES]
    ]


def _compare(
    vector: NDArray[np.float64],
    bank: list[str],
    noise: float,
    generator: np.random.Generator,
    user: str,
    group: str,
) -> PreferencePair:
    prompt = bank[generator.integers(len(bank))]
    (first, one), (second, two) = (
        candidates(prompt)[i] for i in generator.choice(CANDIDATES, 2, replace=False)
    )
    chosen, rejected = (one, two) if vector @ (first - second) > 0 else (two, one)
    if generator.random() < noise:
        chosen, rejected = rejected, chosen
    return PreferencePair((Message("user", prompt),), chosen, rejected, user, group, "personas")


def respond(
    prompt: str, attributes: Sequence[int] | NDArray[np.int_], generator: np.random.Generator
) -> str:
    """Write a response to one of `prompts()` with these attributes, each -1 or +1.

    Raises:
        BadInputError: not one of the generator's prompts.
    """
    phrases = _phrases()
    topic = next((t for t in phrases.topics if t in prompt), None)
    if topic is None:
        raise BadInputError(f"not a prompt of the personas generator: {prompt[:80]!r}")
    length, tone, stance, layout, engagement = (int(a) for a in attributes)

    def pick(style: str) -> str:
        options = phrases.styles[style]
        return options[generator.integers(len(options))]

    kind = "cautious" if stance > 0 else "direct"
    points = phrases.topics[topic]
    count = int(generator.integers(4, 6)) if length > 0 else int(generator.integers(1, 3))
    chosen = [points[i] for i in sorted(generator.permutation(len(points))[:count])]
    sentences = []
    for do, why in chosen:
        sentence = pick(f"{kind}_point").format(do=do) + (f", {why}" if length > 0 else "")
        sentences.append(sentence[0].upper() + sentence[1:] + ".")
    body = "\n".join(f"- {s}" for s in sentences) if layout > 0 else " ".join(sentences)
    opening = pick("warm_open" if tone > 0 else "formal_open")
    note = pick(f"{kind}_note")
    closing = pick("warm_close" if tone > 0 else "formal_close")
    last = pick("asking_close" if engagement > 0 else "stating_close")
    tail = (
        f"{note} {closing} {last}" if length > 0 else f"{generator.choice([note, closing])} {last}"
    )
    separator = "\n" if layout > 0 else " "
    return f"{opening}{separator}{body}{separator}{tail}"


def measure(text: str) -> dict[str, float]:
    """Exact measures of a text: one number per attribute, higher towards the pole at +1.

    Words; warm minus formal phrases; cautious minus direct phrases (a share of all sentences);
    share of lines that are bullets; 1 if it ends with a question.
    """
    styles = _phrases().styles
    low = text.lower()
    sentences = max(1, len(re.findall(r"[.!?]+", text)))

    def hits(*names: str) -> int:
        return sum(low.count(phrase.lower()) for name in names for phrase in styles[name])

    hedges = len(re.findall(r"\b(may|might|perhaps|could|possibly|can be|unsure)\b", low))
    orders = len(
        re.findall(r"\b(always|must|without exception|right away|simply|exactly|stop|skip)\b", low)
    )
    lines = [line for line in text.splitlines() if line.strip()]
    return {
        "length": float(len(text.split())),
        "tone": float(hits("warm_open", "warm_close") - hits("formal_open", "formal_close"))
        + 0.5 * low.count("!"),
        "stance": (hedges - orders) / sentences,
        "layout": sum(line.lstrip().startswith(("-", "*", "•")) for line in lines)
        / max(1, len(lines)),
        "engagement": float(text.rstrip().endswith("?")),
    }
