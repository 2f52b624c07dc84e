"""Draws the figures of docs/architecture.md: python tools/draw_architecture.py."""

from __future__ import annotations

from html import escape
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "docs" / "images"
LAYERS = (
    (("cli: the command line", "api: import fedvpa"),),
    (("network: Flower, secure sums", "winrate: arms, judges", "serving: API, users, page"),),
    (("policy: sampling, conditional DPO, export",),),
    (("experiment: train, evaluate, compare, use",),),
    (("evaluation: protocol, diagnostics, reports",),),
    (("federated: rounds, clients, priors, aggregators, releases",),),
    (("selector: encoder, reward heads, predictor",),),
    (("features: backbone, cache, whitening", "data: reading, sources, partition"),),
    (("functional: pure tensor mathematics", "config, methods, parts"),),
    (("types, console, files, records, errors",),),
)
ROUND = (
    ("server", "release.require: may this round be released?"),
    ("server", "broadcast: parameters, prior's mixture, anchors, prices"),
    ("clients", "posterior from the context; label; train_locally"),
    ("clients", "Update: parameters, and what the contract lists"),
    ("server", "aggregator.add, chunk by chunk, in the order of the cohort"),
    ("server", "release.update: the mean update, or noised sums"),
    ("server", "server optimiser: the new parameters"),
    ("server", "prior.refitted, prior.begun, prototypes.after_round"),
)
COLOURS = {"server": "#dbe5f1", "clients": "#fde9d9"}
FONT = 'font-family="sans-serif" font-size="13" fill="#222"'


def box(x: float, y: float, width: float, text: str, colour: str) -> str:
    """A rectangle of 28 pixels with a text in its middle."""
    place = f'x="{x + width / 2}" y="{y + 18.5}" text-anchor="middle"'
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="28" rx="4" fill="{colour}" stroke="#888"/>'
        f"<text {place} {FONT}>{escape(text)}</text>"
    )


def page(height: int, parts: list[str]) -> str:
    """An SVG of 640 pixels' width."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" width="640">'
    return f'{head}<rect width="640" height="{height}" fill="white"/>' + "".join(parts) + "</svg>\n"


def layers() -> str:
    """Rooms from the top to the bottom; a module imports only what stands below it."""
    parts = []
    for row, (names,) in enumerate(LAYERS):
        width = (620 - 10 * (len(names) - 1)) / len(names)
        for column, name in enumerate(names):
            parts.append(box(10 + column * (width + 10), 10 + 36 * row, width, name, "#dbe5f1"))
    return page(20 + 36 * len(LAYERS), parts)


def one_round() -> str:
    """The steps of a round, and where each is done."""
    parts = []
    for row, (where, text) in enumerate(ROUND):
        y = 10 + 44 * row
        parts += [box(10, y, 90, where, COLOURS[where]), box(110, y, 520, text, COLOURS[where])]
        if row:
            arrow = f"M 370 {y - 15} v 12 m -4 -5 l 4 5 l 4 -5"
            parts.append(f'<path d="{arrow}" stroke="#888" stroke-width="2" fill="none"/>')
    return page(10 + 44 * len(ROUND), parts)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "architecture.svg").write_text(layers())
    (IMAGES / "round.svg").write_text(one_round())
