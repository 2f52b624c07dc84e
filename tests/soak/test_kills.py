"""What survives being killed at any moment, tried many times (`make soak`)."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedvpa.config import FeaturesConfig
from fedvpa.features.cache import FeatureCache
from tests.conftest import write_groups
from tests.unit.test_backbone import fill, items

KILLS = 15


@pytest.mark.soak
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    tiny_model: Path, tmp_path: Path
) -> None:
    data, generator = write_groups(tmp_path / "data"), random.Random(0)
    environment = os.environ | {"FEDVPA_CACHE": str(tmp_path / "cache")}
    program = [sys.executable, "-m", "fedvpa.cli.main", "train"]
    flags = ["--data", str(data), "--split", "train", "--backbone", str(tiny_model), "--layer", "2",
             "--clients", "6", "--rounds", "400", "--inputs", "8", "--latent", "4",
             "--checkpoint-every", "1", "--prototypes.start-round", "30"]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([*program, *flags, "--out", str(whole)], env=environment, check=True)
    for _ in range(KILLS):
        begun = (broken / "config.yaml").is_file()
        command = ["--resume", "--out", str(broken)] if begun else [*flags, "--out", str(broken)]
        process = subprocess.Popen([*program, *command], env=environment)
        time.sleep(generator.uniform(2.0, 8.0))
        process.kill()
        process.wait()
    subprocess.run([*program, "--resume", "--out", str(broken)], env=environment, check=True)
    name = "checkpoint.safetensors"
    assert (broken / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.soak
def test_a_feature_cache_that_many_fill_and_some_die_over_is_whole(
    tiny_model: Path, tmp_path: Path
) -> None:
    path, generator = tmp_path / "f.sqlite", random.Random(0)
    context = multiprocessing.get_context("spawn")
    for _ in range(KILLS):
        path.unlink(missing_ok=True)
        workers = [
            context.Process(target=fill, args=(str(tiny_model), str(path))) for _ in range(5)
        ]
        for worker in workers:
            worker.start()
        time.sleep(generator.uniform(3.0, 7.0))
        workers[0].kill()
        for worker in workers[1:]:
            worker.join()
            assert worker.exitcode == 0
        settings = FeaturesConfig(backbone=str(tiny_model), layer=2, dtype="float32")
        values, _, _, computed, _ = FeatureCache(settings, path).items(items(40))
        assert computed == 0
        assert values.isfinite().all()
