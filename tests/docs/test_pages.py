"""Pages hold what the code says: the table of messages, examples of records, names of files."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from fedvpa.cli.use_commands import read_responses
from fedvpa.data.preferences import pairs_of
from fedvpa.data.reading import read_pairs
from fedvpa.federated.exchanges import exchange_table
from fedvpa.methods import METHODS
from fedvpa.parts import AGGREGATORS, HEADS, JUDGES, PRIORS
from fedvpa.policy.prompts import read_prompts

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
CODE = re.compile(r"`((?:[\w-]+/)*[\w-]+\.(?:py|html|ya?ml))`")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def test_the_table_of_messages_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "messages.md").read_text()
    table = page.partition("<!-- exchanges -->\n")[2].partition("<!-- /exchanges -->")[0]
    assert table == exchange_table()


def test_examples_of_records_are_read() -> None:
    page = (ROOT / "docs" / "data-formats.md").read_text()
    examples = [json.loads(text) for text in re.findall(r"```json\n(.+?)\n```", page)]
    records = [e for e in examples if e.keys() & {"chosen", "response_a", "completions"}]
    pairs = [p for e in records for p in pairs_of(e, "docs")]
    assert (len(records), len(pairs)) == (6, 9)
    assert {p.prompt[0].content for p in pairs} == {"Is tea healthy?"}


def test_example_files_are_read(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    from fedvpa.features.chat import ChatFormat

    folder = ROOT / "examples" / "data"
    for name, clients in (("pairs", 2), ("conversations", 0), ("hh", 0)):
        pairs = read_pairs(folder / f"{name}.jsonl", None, "error").pairs
        assert len({p.client_id for p in pairs} - {None}) == clients
        assert {p.prompt[0].content for p in pairs} == {"Is tea healthy?", "How do I cook rice?"}
    assert len(read_responses(folder / "responses.jsonl")) == 4
    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_model), "tiny")
    assert len(read_prompts(str(folder / "prompts.txt"), None, 99, chat).prompts) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_page_names_files_that_exist(page: Path) -> None:
    text = page.read_text()
    known = {p.as_posix() for folder in ("src", "tests", "examples", "benchmarks", "tools", "docs")
             for p in (ROOT / folder).rglob("*") if p.is_file()}  # fmt: skip
    made = {
        "my_prior.py",
        "config.yaml",
        "client.yaml",
        "server.yaml",
        "report.html",
        "winrate.html",
    }
    for name in CODE.findall(text):
        found = any(path.endswith(f"/{name}") for path in known) or (ROOT / name).exists()
        assert found or name.rpartition("/")[2] in made, f"{page.name}: {name}"
    for link in LINK.findall(text):
        generated = {"cli.md", "settings.md", "licences.md"}
        assert (page.parent / link).exists() or link in generated, f"{page.name}: {link}"


def test_every_method_and_part_is_described() -> None:
    method, concepts = (ROOT / "docs" / f"{n}.md" for n in ("method", "concepts"))
    assert all(f"`{name}`" in method.read_text() for name in METHODS)
    glossary = concepts.read_text().partition("## Glossary")[2]
    for word in ("anchor", "component", "population", "prototype", "mode", "prior", "release"):
        assert re.search(rf"^\| {word} \|", glossary, re.MULTILINE), word
    told = method.read_text() + (ROOT / "docs" / "architecture.md").read_text()
    for name in (*PRIORS, *HEADS, *AGGREGATORS, *JUDGES):
        assert re.search(name.replace("-", "[- ]"), told, re.IGNORECASE), name


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "benchmarks").glob("[a-z]*.py")))
def test_a_benchmark_can_be_imported(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")
