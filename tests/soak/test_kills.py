"""What survives being killed at any moment, tried many times (`make soak`): every long command ends
with what it would have ended with had nobody killed it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedvpa.config import FeaturesConfig
from fedvpa.features.cache import FeatureCache
from tests.conftest import endpoint, write_groups
from tests.unit.test_backbone import fill, items

KILLS = int(os.environ.get("FEDVPA_KILLS", "125"))
"""Kills of each command: a thousand in all."""
MOST = 400
"""Attempts to place them: a command may end before it is killed."""
SELECTOR = ["--layer", "2", "--dtype", "float32", "--clients", "6", "--inputs", "8", "--latent",
            "4"]  # fmt: skip


def child(arguments: list[str], cache: str) -> None:
    """One command, in a process of its own."""
    import sys

    import torch

    torch.set_num_threads(1)
    os.environ.update(FEDVPA_CACHE=cache, HF_HUB_OFFLINE="1")
    from fedvpa.cli.main import main

    sys.exit(main([*arguments, "--quiet"]))


class Killer:
    """Runs commands from a server of processes that has the libraries loaded already, and kills
    them."""

    def __init__(self, cache: Path) -> None:
        self._cache, self._chance = str(cache), random.Random(0)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["torch", "transformers", "trl.trainer.dpo_trainer", "fedvpa.cli.align_commands",
             "fedvpa.cli.winrate_command", "fedvpa.cli.compare_command"]
        )  # fmt: skip

    def whole(self, arguments: list[str]) -> float:
        """Run it to its end; the seconds that took."""
        began = time.monotonic()
        process = self._start(arguments)
        process.join()
        assert process.exitcode == 0, arguments
        return time.monotonic() - began

    def broken(self, arguments: list[str], after: float) -> bool:
        """Kill it after so many seconds; whether it was still running."""
        process = self._start(arguments)
        process.join(after)
        alive = process.exitcode is None
        if alive:
            process.kill()
        process.join()
        assert alive or process.exitcode == 0, arguments
        return alive

    def _start(self, arguments: list[str]) -> Any:
        process = self._context.Process(target=child, args=(arguments, self._cache))
        process.start()
        return process

    def moment(self, seconds: float) -> float:
        """When to kill a command that takes so many seconds."""
        return self._chance.uniform(0.02, seconds)


@dataclass(frozen=True)
class Long:
    """A long command: how it is begun in a folder and how it goes on, what it ends with, and the
    file that says that it has ended, of a command that is not given again then."""

    begin: Callable[[Path], list[str]]
    again: Callable[[Path], list[str]]
    ends_with: Callable[[Path], Any]
    last: str = ""

    def ended(self, out: Path) -> bool:
        """Whether there is nothing left to do, although it may have been killed."""
        return bool(self.last) and (out / self.last).is_file()


def same(command: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
    return command


def resumed(marker: str, *flags: str) -> Any:
    """Goes on with --resume once something was begun, else begins."""

    def of(begin: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
        def again(out: Path) -> list[str]:
            begun = (out / marker).is_file()
            if not begun:
                return begin(out)
            return [*flags, str(out), "--resume"] if flags else [*begin(out), "--resume"]

        return again

    return of


def commands(place: Path, model: Path, url: str) -> dict[str, Long]:
    """Every long command, over the run in `place` and the policy there."""
    data, run, policy = place / "data", str(place / "run"), str(place / "policy")
    backbone = ["--backbone", str(model), *SELECTOR]
    small = ["--base", str(model), "--form", "gate", "--max-prompt-tokens", "32", "--batch", "4",
             "--micro-batch", "2", "--rank", "2", "--save-every", "1"]  # fmt: skip

    def train(out: Path) -> list[str]:
        return ["train", "--data", str(data), "--split", "train", *backbone, "--rounds", "60",
                "--checkpoint-every", "1", "--population.structure", "groups",
                "--population.order", "2", "--out", str(out)]  # fmt: skip

    def compare(out: Path) -> list[str]:
        return ["compare", "--methods", "fedvpl,fedavg-btl", "--seeds", "0,1", "--data", str(data),
                "--split", "train", "--test-split", "test", *backbone, "--rounds", "8",
                "--unseen-clients", "4", "--context", "4", "--out", str(out)]  # fmt: skip

    def evaluate(out: Path) -> list[str]:
        return ["evaluate", run, "--data", str(data), "--split", "test", "--clients", "4",
                "--json", str(out / "eval.json"), "--report", str(out / "report.html")]  # fmt: skip

    def align(out: Path) -> list[str]:
        return ["align", run, "--prompts", str(place / "p.txt"), *small, "--candidates", "4",
                "--max-new-tokens", "6", "--margin", "0", "--sample-batch", "8", "--out",
                str(out)]  # fmt: skip

    def feddpo(out: Path) -> list[str]:
        return ["feddpo", run, *small, "--rounds", "2", "--cohort", "2", "--pairs", "4",
                "--max-response-tokens", "16", "--out", str(out)]  # fmt: skip

    def winrate(out: Path) -> list[str]:
        return ["winrate", policy, "--prompts", str(place / "q.txt"), "--max-new-tokens", "6",
                "--judge-url", url, "--judge-model", "wise", "--out", str(out)]  # fmt: skip

    def convert(out: Path) -> list[str]:
        return ["data", "convert", str(place / "big.jsonl"), "--out", str(out / "out.jsonl")]

    def embed(out: Path) -> list[str]:
        return ["embed", "--data", str(data), "--split", "train", *backbone[:6],
                "--max-response-tokens", str(17 + len(out.name))]  # fmt: skip

    def weights(out: Path) -> Any:
        return (out / "adapter/adapter_model.safetensors").read_bytes()

    def wins(out: Path) -> Any:
        found = json.loads((out / "winrate.json").read_text())
        return [found["samples"], found["judges"]["endpoint"]["against_base"]]

    def one_file(name: str) -> Callable[[Path], Any]:
        return lambda out: (out / name).read_bytes()

    begun = resumed("config.yaml", "train", "--out")
    asked, taken = resumed("work/asked.json"), resumed("asked.json")
    return {
        "train": Long(train, begun(train), one_file("checkpoint.safetensors")),
        "compare": Long(compare, same(compare), one_file("results.md")),
        "evaluate": Long(evaluate, same(evaluate), one_file("eval.json")),
        "align": Long(align, asked(align), weights),
        "feddpo": Long(feddpo, asked(feddpo), weights),
        "winrate": Long(winrate, taken(winrate), wins),
        "convert": Long(convert, same(convert), one_file("out.jsonl"), "out.jsonl"),
        "embed": Long(embed, same(embed), lambda out: None),
    }


@pytest.mark.soak
@pytest.mark.parametrize(
    "name", ["train", "compare", "evaluate", "align", "feddpo", "winrate", "convert", "embed"]
)
def test_a_command_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    data = write_groups(place / "data")
    (place / "p.txt").write_text("is tea good\nplease help\nask a friend\nstop\n")
    (place / "q.txt").write_text("is tea bad\nno\n")
    pairs = (data / "kind" / "train.jsonl").read_text()
    (place / "big.jsonl").write_text("".join(pairs.replace("please", f"so {i}") for i in range(80)))
    killer = Killer(tmp_path / "cache")
    with endpoint(_says_longer) as (url, _):
        every = commands(place, tiny_model, url)
        if name in ("evaluate", "align", "feddpo", "winrate"):
            killer.whole(every["train"].begin(place / "run"))
        if name == "winrate":
            killer.whole(every["align"].begin(place / "policy"))
        long, whole = every[name], tmp_path / "whole"
        seconds = killer.whole(long.begin(whole))
        wanted, kills, ends = long.ends_with(whole), 0, 0
        for attempt in range(MOST):
            if kills >= KILLS:
                break
            out = tmp_path / f"broken-{ends}"
            moment, began = killer.moment(0.9 * seconds), time.monotonic()
            if killer.broken(long.again(out), moment):
                kills += 1
                if long.ended(out):  # killed between its last file and its exit
                    assert long.ends_with(out) == wanted, f"attempt {attempt}"
                    ends += 1
            else:
                assert long.ends_with(out) == wanted, f"attempt {attempt}"
                # features are cached by now, and what goes on takes less than what begins
                seconds, ends = max(0.3, min(seconds, time.monotonic() - began)), ends + 1
        out = tmp_path / f"broken-{ends}"
        killer.whole(long.again(out))
        assert long.ends_with(out) == wanted
    assert kills >= min(KILLS, MOST) * 0.5


def _says_longer(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    text = request["messages"][-1]["content"]
    a, b = (text.split(f"<{x}>\n")[1].split(f"\n</{x}>")[0] for x in "AB")
    said = "A" if (len(a), a) > (len(b), b) else "B"
    message = {"role": "assistant", "content": said}
    return 200, {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}


@pytest.mark.soak
def test_a_feature_cache_that_many_fill_and_some_die_over_is_whole(
    tiny_model: Path, tmp_path: Path
) -> None:
    path, generator = tmp_path / "f.sqlite", random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "tests.unit.test_backbone"])
    for _ in range(KILLS // 5):
        path.unlink(missing_ok=True)
        workers = [
            context.Process(target=fill, args=(str(tiny_model), str(path))) for _ in range(5)
        ]
        for worker in workers:
            worker.start()
        time.sleep(generator.uniform(0.1, 2.0))
        workers[0].kill()
        for worker in workers[1:]:
            worker.join()
            assert worker.exitcode == 0
        settings = FeaturesConfig(backbone=str(tiny_model), layer=2, dtype="float32")
        found = FeatureCache(settings, path).items(items(40))
        assert found.computed == 0
        assert found.values.isfinite().all()
