"""The pages on extending, executed: their files from outside the package, then their code."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "extending"
BLOCK = re.compile(r'^```python(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
PARTS = [page.stem for page in sorted(PAGES.glob("*.md")) if page.stem != "index"]


def test_there_is_a_page_for_each_kind_of_part() -> None:
    assert PARTS == ["aggregator", "head", "judge", "prior", "source"]
    index = (PAGES / "index.md").read_text()
    assert all(f"({name}.md)" in index for name in PARTS)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_from_outside_takes_one_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TABLE_OF_PAIRS", "")
    blocks = BLOCK.findall((PAGES / f"{name}.md").read_text())
    files = [(title, code) for title, code in blocks if title]
    assert len(files) == 1
    for title, code in files:
        (tmp_path / title).write_text(code)
        sys.modules.pop(title.removesuffix(".py"), None)
    uses = [code for title, code in blocks if not title]
    assert any("assert" in code for code in uses)
    for code in uses:
        exec(compile(code, f"docs/extending/{name}.md", "exec"), {})


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    from fedvpa import BadInputError, build_config
    from fedvpa.winrate.judges import Judging, build_judges

    with pytest.raises(BadInputError, match=r"unknown prior 'peer' \(known: gaussian, peers"):
        build_config({"prior": {"kind": "peer"}})
    with pytest.raises(BadInputError, match="unknown reward head 'linear'"):
        build_config({"model": {"conditioning": "linear"}})
    with pytest.raises(BadInputError, match="'no_such_module:THING' cannot be imported"):
        build_config({"method": "fedvpl", "federation": {"aggregator": "no_such_module:THING"}})
    with pytest.raises(BadInputError, match=r"is a type, not a fedvpa\.Part"):
        build_config({"method": "fedvpl", "federation": {"aggregator": "pathlib:Path"}})
    with pytest.raises(BadInputError, match=r"unknown judge 'gpt' \(known: exact, reward, endpoi"):
        build_judges(["gpt"], Judging([], [], ""))


def test_a_module_of_the_current_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedvpa import build_config

    (tmp_path / "lies_here.py").write_text(
        "from fedvpa import Part\nMINE = Part('mine', build=lambda *, config: None)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    config = build_config({"method": "fedvpl", "federation": {"aggregator": "lies_here:MINE"}})
    assert config.federation.aggregator == "lies_here:MINE"
