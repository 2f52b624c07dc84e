"""Stage 2 as a user runs it: align, generate and chat, on a tiny random model."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedvpa.cli.main import main
from fedvpa.policy.card import load_card, save_card
from tests.conftest import endpoint, write_groups
from tests.e2e.test_cli import flags

SMALL = [
    "--candidates", "4", "--max-new-tokens", "6", "--batch", "2", "--margin", "0.0", "--tokens",
    "2", "--rank", "2", "--epochs",
    "1", "--save-every", "2", "--dtype", "float32", "--pairs-per-prompt", "1", "--users", "1",
    "--iterations", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def aligned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(data, selector run, policy)."""
    folder = tmp_path_factory.mktemp("align")
    os.environ["FEDVPA_CACHE"] = str(folder / "cache")
    data, run, out = write_groups(folder / "data"), folder / "run", folder / "policy"
    more = {"rounds": 12, "population.structure": "groups", "population.order": 2}
    assert (
        main(["train", "--data", str(data), "--split", "train", *flags(tiny_model, run, **more)])
        == 0
    )
    prompts = folder / "prompts.txt"
    prompts.write_text("is tea good\nplease help\nask a friend\nstop\nis tea good\n")
    command = [
        "align",
        str(run),
        "--prompts",
        str(prompts),
        "--base",
        str(tiny_model),
        "--out",
        str(out),
        *SMALL,
    ]
    assert main(command) == 0
    return data, run, out


def test_a_policy_knows_its_preferences_and_what_it_was_made_of(
    aligned: tuple[Path, Path, Path],
) -> None:
    _, _, out = aligned
    card, summary = (json.loads((out / name).read_text()) for name in ("policy.json", "align.json"))
    assert sorted(card["preferences"]) == ["blunt", "kind"]
    assert (summary["prompts_used"], summary["prompts_skipped"]) == (4, {"repetition": 1})
    first, second = summary["iterations"]
    for row in (first, second):
        kept = sum(row["pairs"].values())
        assert kept + row["dropped_under_margin"] + row["dropped_without_two_responses"] == 12
    assert len((out / "work/iteration-0/candidates.jsonl").read_text().splitlines()) == 16
    assert {f.name for f in (out / "work/iteration-1").glob("candidates*")} == {
        f"candidates-{c}.jsonl" for c in range(3)
    }


def test_an_interrupted_alignment_goes_on_to_the_same_policy(
    aligned: tuple[Path, Path, Path],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, run, out = aligned
    asked = json.loads((out / "work/asked.json").read_text())
    again = tmp_path / "again"
    command = [
        "align",
        str(run),
        "--prompts",
        asked["prompts"],
        "--base",
        str(tiny_model),
        "--out",
        str(again),
        *SMALL,
    ]
    assert main([*command, "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert main(command) == 0
    weights = (again / "adapter/adapter_model.safetensors").read_bytes()
    assert weights == (out / "adapter/adapter_model.safetensors").read_bytes()
    assert main(command) == 2
    assert "not empty" in capsys.readouterr().err
    # as if killed while candidates were written, and in the middle of the second training
    candidates = again / "work/iteration-0/candidates.jsonl"
    candidates.write_bytes(candidates.read_bytes()[:-5])
    for path in sorted((again / "work/iteration-1/trained").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (again / "policy.json").unlink()
    assert main([*command, "--resume"]) == 0
    assert (again / "adapter/adapter_model.safetensors").read_bytes() == weights
    assert main([*command, "--resume", "--beta", "0.3"]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_an_alignment_that_was_killed_goes_on_to_the_same_policy(
    aligned: tuple[Path, Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    _, run, out = aligned
    asked = json.loads((out / "work/asked.json").read_text())
    command = [
        "align",
        str(run),
        "--prompts",
        asked["prompts"],
        "--base",
        str(tiny_model),
        *SMALL[:-2],
        "--epochs",
        "40",
    ]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "fedvpa.cli.main", *command, "--out", str(killed), "--quiet"]
    )
    began = time.monotonic()
    while not list(
        killed.glob("work/iteration-0/checkpoints/checkpoint-*/conditioner.safetensors")
    ):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() - began < 120
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (killed / "policy.json").exists()
    assert main([*command, "--out", str(killed), "--resume"]) == 0
    for name in ("adapter/adapter_model.safetensors", "conditioner.safetensors"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_generate_and_chat_under_every_kind_of_preference(
    aligned: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, _, out = aligned
    prompts, target = tmp_path / "p.txt", tmp_path / "r.jsonl"
    prompts.write_text("is tea good\nstop\n")
    greedy = ["--temperature", "0", "--max-new-tokens", "4"]
    texts = {}
    for name, choice in {
        "kind": ["--prefer", "kind"], "mix": ["--mix", "kind=1,blunt=0"], "off": ["--off"],
        "user": ["--user", str(data / "kind/test.jsonl")],
    }.items():  # fmt: skip
        command = [
            "generate",
            str(out),
            "--prompts",
            str(prompts),
            "--responses",
            str(target),
            *choice,
            *greedy,
        ]
        assert main(command) == 0
        rows = [json.loads(line) for line in target.read_text().splitlines()]
        assert [row["prompt"][-1]["content"] for row in rows] == ["is tea good", "stop"]
        texts[name] = [row["response"] for row in rows]
    assert texts["kind"] == texts["mix"]
    assert main(["export", str(out), "--prefer", "kind", "--out", str(tmp_path / "plain")]) == 0
    assert (tmp_path / "plain/model.safetensors").is_file()
    assert main(["export", str(out), "--prefer", "kind", "--out", str(tmp_path / "plain")]) == 2
    assert (
        main(
            [
                "generate",
                str(out),
                "--prompts",
                str(prompts),
                "--responses",
                str(target),
                "--prefer",
                "rude",
            ]
        )
        == 2
    )
    assert "no preference 'rude' (known: " in capsys.readouterr().err
    monkeypatch.setattr(
        "sys.stdin",
        io.StringIO(
            "is tea good\n/prefer nobody\n/prefer blunt\n/reset\nis tea good\n/what\n/quit\n"
        ),
    )
    assert main(["chat", str(out), "--prefer", "kind", *greedy]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == texts["kind"][0]
    assert "no preference 'nobody'" in said.err
    assert "unknown command /what" in said.err


def test_the_monolithic_and_the_federated_baseline_are_policies_with_one_preference(
    aligned: tuple[Path, Path, Path],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, run, _ = aligned
    shared, prompts = tmp_path / "shared", tmp_path / "p.txt"
    prompts.write_text("is tea good\nstop\nask a friend\n")
    more = {"method": "fedavg-btl", "rounds": 3}
    names = ("backbone", "layer", "dtype", "clients", "inputs", "out")
    settings = zip(names, (tiny_model, 2, "float32", 6, 16, shared))
    given = [
        text for name, value in [*settings, *more.items()] for text in (f"--{name}", str(value))
    ]
    assert main(["train", "--data", str(data), "--split", "train", *given]) == 0
    small = [*SMALL[:-4], "--form", "shift"]
    assert (
        main(
            [
                "align",
                str(shared),
                "--prompts",
                str(prompts),
                "--base",
                str(tiny_model),
                "--out",
                str(tmp_path / "dpo"),
                *small,
            ]
        )
        == 0
    )
    command = [
        "feddpo", str(run), "--base", str(tiny_model), "--out", str(tmp_path / "fed"), "--rounds",
        "2", "--cohort", "2",
        "--pairs", "3", "--rank", "2", "--dtype", "float32",
    ]  # fmt: skip
    assert main(command) == 0
    for name in ("dpo", "fed"):
        assert list(json.loads((tmp_path / name / "policy.json").read_text())["preferences"]) == [
            "shared"
        ]
        assert (
            main(
                [
                    "generate",
                    str(tmp_path / name),
                    "--prompts",
                    str(prompts),
                    "--responses",
                    str(tmp_path / "r.jsonl"),
                ]
            )
            == 0
        )
    weights = (tmp_path / "fed/adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "fed" / "work" / "round-1")  # as if it was killed then
    (tmp_path / "fed/policy.json").unlink()
    assert main([*command, "--resume"]) == 0
    assert (tmp_path / "fed/adapter/adapter_model.safetensors").read_bytes() == weights
    # no client's pairs are left on the disk
    assert not list((tmp_path / "fed/work").rglob("pairs"))
    assert main(["chat", str(tmp_path / "fed"), "--user", str(data / "kind/test.jsonl")]) == 2
    assert "the policy has one preference for everybody" in capsys.readouterr().err


def test_what_cannot_be_aligned_is_refused(
    aligned: tuple[Path, Path, Path],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, run, _ = aligned
    empty = tmp_path / "empty.txt"
    empty.touch()
    out = tmp_path / "out"
    assert (
        main(
            [
                "align",
                str(run),
                "--prompts",
                str(empty),
                "--base",
                str(tiny_model),
                "--out",
                str(out),
            ]
        )
        == 2
    )
    assert "no usable prompt" in capsys.readouterr().err
    local = tmp_path / "local"
    values = {
        "backbone": tiny_model,
        "layer": 2,
        "dtype": "float32",
        "clients": 6,
        "rounds": 2,
        "inputs": 16,
        "out": local,
    }
    settings = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    assert (
        main(["train", "--data", str(data), "--split", "train", "--method", "local", *settings])
        == 0
    )
    prompts = tmp_path / "p.txt"
    prompts.write_text("stop\n")
    assert (
        main(
            [
                "align",
                str(local),
                "--prompts",
                str(prompts),
                "--base",
                str(tiny_model),
                "--out",
                str(out),
            ]
        )
        == 2
    )
    assert "has no latent preference" in capsys.readouterr().err
    assert (
        main(["align", str(run), "--prompts", str(prompts), "--out", str(out), "--candidates", "1"])
        == 2
    )
    assert "candidates: Input should be greater than or equal to 2" in capsys.readouterr().err
    assert main(["chat", str(run)]) == 2
    assert "no policy there" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_win_rates_are_judged_without_the_selector(
    aligned: tuple[Path, Path, Path],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, _, out = aligned
    other = tmp_path / "other-model"  # the judge's backbone: not the selector's
    shutil.copytree(tiny_model, other)
    target = tmp_path / "wins"
    steering = tmp_path / "steering.yaml"
    steering.write_text("kind: please help a friend\nblunt: stop\n")
    command = [
        "winrate", str(out), "--prompts", str(data), "--split", "test", "--limit", "4", "--out",
        str(target),
        "--judge-pairs", str(data), "--judge-backbone", str(other), "--steering", str(steering),
        "--versus", f"twin={out}",
        "--mix", "kind=0.5,blunt=0.5", "--user", f"me:kind={data / 'kind/test.jsonl'}",
        "--max-new-tokens", "8",
        "--temperature", "1", "--top-p", "1",
    ]  # fmt: skip
    assert main([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    arms = ["base", "kind", "blunt", "kind=0.5,blunt=0.5", "user me"]
    arms += [f"{kind} {name}" for kind in ("prompted", "twin") for name in ("kind", "blunt")]
    assert sorted(a["name"] for a in results["arms"]) == sorted(arms)
    assert results["prompt_groups"] == {"blunt & kind": 4}
    # neither a user nor another policy
    assert results["mixes"]["arms"] == ["kind", "kind=0.5,blunt=0.5", "blunt"]
    judge = results["judges"]["reward"]
    assert set(judge["accuracy"]) == {"kind", "blunt"}
    # neither what the selector saw nor what is on the judged prompts
    assert judge["pairs"] == {"kind": 20, "blunt": 20}
    for criterion in ("kind", "blunt"):
        assert set(judge["against_base"][criterion]) == set(arms) - {"base"}
        for row in judge["against_base"][criterion].values():
            assert (
                0
                <= row["win_rate"]["low"]
                <= row["win_rate"]["mean"]
                <= row["win_rate"]["high"]
                <= 1
            )
            assert row["win_rate"]["n"] == 4
    twin, one = judge["against_base"]["kind"]["twin kind"], judge["against_base"]["kind"]["kind"]
    assert twin["win_rate"] == one["win_rate"]  # the same policy on the same seed
    assert judge["own_against"]["kind"]["twin kind"] == {
        **judge["own_against"]["kind"]["twin kind"],
        "ties": 4,
    }
    assert (
        results["texts"]["base"]["kl_per_token"]["mean"]
        == 0
        < results["texts"]["kind"]["kl_per_token"]["mean"]
    )
    # not computed, so not 0
    assert results["texts"]["prompted kind"]["kl_per_token"]["mean"] is None
    page = (target / "winrate.html").read_text()
    assert "Accuracy on prompts it was not trained on" in page
    assert len((target / "responses/00.jsonl").read_text().splitlines()) == 5
    assert main(command) == 2
    assert "not empty" in capsys.readouterr().err
    assert main([*command, "--resume", "--judge-backbone", str(tiny_model)]) == 2
    assert "needs another" in capsys.readouterr().err
    (target / "responses/01.jsonl").unlink()
    assert main([*command, "--resume"]) == 0
    assert json.loads((target / "winrate.json").read_text())["judges"] == results["judges"]
    assert main([*command, "--resume", "--seed", "5"]) == 2
    assert main([*command[:9], str(tmp_path / "none")]) == 2
    assert "no judge" in capsys.readouterr().err
    assert main([*command[:9], str(tmp_path / "none"), "--exact", "--max-prompt-tokens", "1"]) == 2
    assert "no usable prompt" in capsys.readouterr().err
    assert main([*command[:9], str(tmp_path / "none"), "--exact"]) == 2
    assert "none of kind, blunt" in capsys.readouterr().err.replace("blunt, kind", "kind, blunt")


def test_a_judge_that_fails_is_missing_and_the_command_says_so(
    aligned: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, out = aligned
    prompts, target = tmp_path / "p.txt", tmp_path / "wins"
    prompts.write_text("is tea good\nstop\nask a friend\n")
    command = [
        "winrate", str(out), "--prompts", str(prompts), "--out", str(target),
        "--trained-prompts", "keep", "--max-new-tokens", "6", "--temperature", "1",
        "--judge-model", "wise", "--judge-price", "1,2", "--judge-url",
    ]  # fmt: skip
    with endpoint(lambda _: (403, {"error": "no"})) as (url, asked):
        assert main([*command, url]) == 1
        assert len(asked) <= 8  # a refusal is not asked again
    said = capsys.readouterr().err
    assert "judge 'endpoint' failed and its figures are missing" in said
    results = json.loads((target / "winrate.json").read_text())
    assert "against_base" not in results["judges"]["endpoint"]
    assert "failed; its figures are missing" in (target / "winrate.html").read_text()
    with endpoint(_says_longer) as (url, asked):
        assert main([*command, url, "--resume"]) == 0
    found = json.loads((target / "winrate.json").read_text())["judges"]["endpoint"]
    prompts.write_text("is tea good\nstop\nask a friend\nplease\n")
    assert main([*command, url, "--resume"]) == 2  # the responses there are to other prompts
    assert "was begun with other settings" in capsys.readouterr().err
    assert found["disagreements"] == 0
    assert found["requests"] == len(asked) == 2 * found["comparisons"]
    assert found["cost"] == pytest.approx(len(asked) * (7 + 2 * 1) / 1e6)


def _says_longer(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """An honest endpoint: the longer reply is better, whatever the order."""
    text = request["messages"][-1]["content"]
    a, b = (text.split(f"<{x}>\n")[1].split(f"\n</{x}>")[0] for x in "AB")
    said = "A" if (len(a), a) > (len(b), b) else "B"
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": f" {said}."},
    }
    usage = {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}
    return 200, {
        "id": "1",
        "object": "x",
        "created": 1,
        "model": "wise",
        "system_fingerprint": "",
        "choices": [choice],
        "usage": usage,
    }


def test_prompts_that_were_trained_on_are_left_out_of_win_rates(
    aligned: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, out = aligned
    trained = json.loads((out / "work/asked.json").read_text())["prompts"]
    more = tmp_path / "more.txt"
    more.write_text(Path(trained).read_text() + "\nplease is bad\n")
    with endpoint(_says_longer) as (url, _):
        command = ["winrate", str(out), "--judge-url", url, "--judge-model", "wise",
                   "--max-new-tokens", "4"]  # fmt: skip
        assert main([*command, "--prompts", trained, "--out", str(tmp_path / "none")]) == 2
        assert "all 4 of them were trained on" in capsys.readouterr().err
        assert main([*command, "--prompts", str(more), "--out", str(tmp_path / "some")]) == 0
    assert "prompts left out: 4 x trained on" in capsys.readouterr().err


def _retold(name: str, **more: Any) -> Any:
    def damage(policy: Path) -> None:
        file = policy / name
        file.write_text(json.dumps(json.loads(file.read_text()) | more))

    return damage


def _cut(name: str) -> Any:
    return lambda policy: (policy / name).write_bytes((policy / name).read_bytes()[:-9])


WRITTEN = "is not what was written there"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_retold("policy.json", form="loud"), "policy.json: damaged, or not of this version: form"),
        (_retold("policy.json", scale="x"), "policy.json: damaged"),
        (_retold("policy.json", neutral=3), "policy.json: damaged"),
        (_cut("policy.json"), "policy.json: damaged"),
        (_retold("policy.json", form="prefix"), WRITTEN),
        (_retold("policy.json", scale=0.0), WRITTEN),
        (_retold("policy.json", preferences={"a": [1.0]}), WRITTEN),
        (_retold("policy.json", neutral=[1e308] * 4), WRITTEN),
        (_retold("adapter/adapter_config.json", lora_alpha=800), WRITTEN),
        (_cut("adapter/adapter_config.json"), WRITTEN),
        (_cut("adapter/adapter_model.safetensors"), WRITTEN),
        (_cut("conditioner.safetensors"), WRITTEN),
        (lambda p: (p / "conditioner.safetensors").unlink(), "conditioner.safetensors: cannot be"),
        # PEFT would ask the Hub for it
        (lambda p: (p / "adapter/adapter_model.safetensors").unlink(), "cannot be read: No such"),
    ],
)  # fmt: skip
def test_a_damaged_policy_names_the_file(
    damage: Any, says: str, aligned: tuple[Path, Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _, _, out = aligned
    policy = tmp_path / "policy"
    shutil.copytree(out, policy, ignore=shutil.ignore_patterns("work"))
    damage(policy)
    command = ["generate", str(policy), "--prompts", "personas", "--limit", "1", "--prefer", "kind"]
    assert main([*command, "--responses", str(tmp_path / "r.jsonl")]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert str(policy) in said


def test_a_policy_refuses_the_z_of_another_selector(
    aligned: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run, out = aligned
    policy = tmp_path / "policy"
    shutil.copytree(out, policy, ignore=shutil.ignore_patterns("work"))
    card = json.loads((policy / "policy.json").read_text())
    assert card["run"] == json.loads((run / "data.json").read_text())["identity"]
    save_card(replace(load_card(policy), run="another"), policy)
    command = ["generate", str(policy), "--prompts", "personas", "--limit", "1", "--responses",
               str(tmp_path / "r.jsonl"), "--user", str(data / "kind/test.jsonl")]  # fmt: skip
    assert main(command) == 2
    assert (
        "is another run than the one that this policy was trained with" in capsys.readouterr().err
    )
