"""What the documentation's site takes from the code: the command line, the settings, and results.

MkDocs calls these functions by name (mkdocs.yml, `hooks`).
"""

from __future__ import annotations

import argparse
import io
import os
import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedvpa.cli.main import COMMANDS, Command, build_parser
from fedvpa.config import BASIC, build_config, leaf_settings, settings_readable, value_of
from fedvpa.methods import METHODS

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "results/*",
    "examples/data/*",
    "examples/*.py",
    "examples/*.ipynb",
    "benchmarks/*.yaml",
    "benchmarks/*.md",
)
"""Files that pages link to, though they lie outside of docs/."""


def on_files(files: Files, config: Any) -> Files:
    """Add generated pages, and the files outside of docs/ that pages link to."""
    pages = {
        "cli.md": cli_reference(),
        "settings.md": settings_reference(),
        "licences.md": licences(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            place = path.relative_to(ROOT).as_posix()
            if place.endswith(".md"):  # as it is, and not as a page of the site
                place += ".txt"
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def licences() -> str:
    """What is installed with fedvpa and its extras for use, with the licence that each states."""
    found: dict[str, tuple[str, str]] = {}
    todo = [Requirement("fedvpa[federation,privacy]")]
    while todo:
        wanted = todo.pop()
        try:
            package = distribution(wanted.name)
        except PackageNotFoundError:  # not needed on this machine
            continue
        name = canonicalize_name(wanted.name)
        if name in found:
            continue
        found[name] = (package.version, _licence(package))
        for line in package.requires or ():
            more = Requirement(line)
            extras = [{"extra": extra} for extra in (*wanted.extras, "")]
            if more.marker is None or any(more.marker.evaluate(extra) for extra in extras):
                todo.append(more)
    lines = [
        "# Licences",
        "fedvpa is under the Apache License 2.0. With it, and its extras `federation` and"
        " `privacy`, come these packages (as installed where this page was made; `make sbom` writes"
        " the same of a whole environment as CycloneDX):",
        "",
        "| package | version | licence |",
        "|---|---|---|",
    ]
    rows = [f"| {name} | {version} | {text} |" for name, (version, text) in sorted(found.items())]
    return "\n".join([*lines, *rows]) + "\n"


def _licence(package: Distribution) -> str:
    """The licence that a package states: an SPDX expression, or a classifier, or a short text."""
    about = package.metadata
    classifiers = [c for c in about.get_all("Classifier") or () if c.startswith("License ::")]
    stated = about["License-Expression"] or "; ".join(c.rpartition(" :: ")[2] for c in classifiers)
    return stated or (about["License"] or "see its files").splitlines()[0][:80]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs/ point to where `on_files` has put the files."""
    up = "../" * page.file.src_uri.count("/")
    for folder in ("results", "examples", "benchmarks"):
        markdown = markdown.replace(f"](../{folder}/", f"]({up}{folder}/")
    for path in (*ROOT.glob("results/*.md"), *ROOT.glob("benchmarks/*.md")):
        place = path.relative_to(ROOT).as_posix()
        markdown = markdown.replace(f"{place})", f"{place}.txt)")
    return with_mathml(markdown) if page.file.src_uri == "equations.md" else markdown


def with_mathml(markdown: str) -> str:
    """Formulas as MathML, which browsers show without any script."""
    block = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
    display = block.sub(lambda m: convert(m[1].strip(), display="block"), markdown)
    return re.sub(r"\$([^$\n]+)\$", lambda m: f"<span>{convert(m[1].strip())}</span>", display)


def cli_reference() -> str:
    """Every command's ``--help-all``."""
    os.environ["COLUMNS"] = "100"
    parser = build_parser(["--help-all"], everything=True)
    out = ["# Command line\n", "Every command with all of its flags, as `--help-all` shows them.\n"]
    for name, entry in COMMANDS.items():
        own = _choice(parser, name)
        if isinstance(entry, Command):
            out.append(_section(f"fedvpa {name}", own))
            continue
        for word in entry.commands:
            out.append(_section(f"fedvpa {name} {word}", _choice(own, word)))
    return "\n".join(out)


def _choice(parser: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found: argparse.ArgumentParser = action.choices[name]
            return found
    raise KeyError(name)


def _section(title: str, parser: argparse.ArgumentParser) -> str:
    text = io.StringIO()
    parser.print_help(text)
    return f"## {title}\n\n```text\n{text.getvalue().rstrip()}\n```\n"


def settings_reference() -> str:
    """Every setting: name, default, what it is, and which methods read it."""
    defaults = build_config({})
    rows = [
        "# Methods and settings\n",
        "| `--method` | trains | serves a user by |",
        "|---|---|---|",
    ]
    rows += [f"| `{name}` | {m.about} | {m.served} |" for name, m in METHODS.items()]
    rows += ["", "## Settings\n", "`*` marks what `--help` shows; the rest is in `--help-all`.\n",
            "| setting | default of fedvpa-gp | what | read by |", "|---|---|---|---|"]  # fmt: skip
    for name, info in leaf_settings().items():
        readers = [m for m in METHODS if name in settings_readable(m)]
        who = "all" if len(readers) == len(METHODS) else ", ".join(readers)
        mark = " *" if name in BASIC else ""
        value = value_of(defaults, name)
        about = (info.description or "").replace("|", "\\|")
        rows.append(f"| `{name}`{mark} | `{value}` | {about} | {who} |")
    return "\n".join(rows) + "\n"
