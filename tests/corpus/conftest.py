"""Two small runs, for what is tried on their files and with other people's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedvpa.cli.main import main
from tests.conftest import write_groups

FLAGS = ["--layer", "2", "--dtype", "float32", "--rounds", "4", "--local-steps", "2", "--inputs",
         "8", "--latent", "4", "--clients", "4", "--method", "fedvpl+mix"]  # fmt: skip


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    """Two finished runs of the same shapes, `one` and `two`, and their pairs in `data`."""
    folder = tmp_path_factory.mktemp("runs")
    write_groups(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDVPA_CACHE", str(folder / "cache"))
        for name, seed in (("one", 0), ("two", 1)):
            data = ["--data", str(folder / "data"), "--split", "train", "--seed", str(seed)]
            out = ["--backbone", str(tiny_model), "--out", str(folder / name)]
            assert main(["train", *data, *out, *FLAGS, "--quiet"]) == 0
        yield folder
