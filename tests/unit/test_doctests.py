"""Examples in docstrings run, and every public function and class has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

import fedvpa
from tests.conftest import write_groups

SOURCE = Path(fedvpa.__file__).parent
MODULES = sorted(
    ".".join(("fedvpa", *file.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for file in SOURCE.rglob("*.py")
    if ">>> " in file.read_text()
)


@pytest.fixture(scope="module")
def names(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What examples may take for granted: a finished run, and pairs to evaluate on."""
    folder = tmp_path_factory.mktemp("doctests")
    data = write_groups(folder / "data")
    run = fedvpa.train(
        data, folder / "run", split="train", clients=4, rounds=4, backbone=str(tiny_model), layer=2,
        inputs=8, latent=4, progress=False,
        population={"structure": "groups", "order": 2},
    )  # fmt: skip
    pairs = fedvpa.read_pairs(data, "test").pairs
    return {"run": run, "test_pairs": pairs}


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module_run(name: str, names: dict[str, Any]) -> None:
    result = doctest.testmod(
        importlib.import_module(name), extraglobs=names, optionflags=doctest.ELLIPSIS
    )
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("name", ["train", "evaluate", "read_pairs", "build_config", "load_policy"])
def test_a_public_function_tells_arguments_errors_and_an_example(name: str) -> None:
    function = getattr(fedvpa, name)
    text = inspect.getdoc(function) or ""
    assert "Raises:" in text
    assert ">>> " in text
    for argument in inspect.signature(function).parameters:
        assert f"{argument}: " in text, f"{name}({argument})"
