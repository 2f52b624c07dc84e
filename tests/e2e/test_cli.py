"""The command line as a user runs it: files in, tables and files out, exit codes, interruptions."""

from __future__ import annotations

import gzip
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedvpa.checkpoint import load_checkpoint
from fedvpa.cli.main import main
from tests.conftest import write_groups

GOOD = {"prompt": "is tea good", "chosen": "yes", "rejected": "no"}


STEPS = ("local-steps", "learning-rate", "prototypes.start_round")


def flags(model: Path, out: Path, **more: object) -> list[str]:
    values = {
        "backbone": model, "layer": 2, "dtype": "float32", "clients": 6, "rounds": 6,
        "local-steps": 5, "out": out,
        "inputs": 16, "latent": 4, "checkpoint-every": 2, "validate-every": 2, **more,
    }  # fmt: skip
    if values.get("method", "fedvpa-gp") == "fedvpa-gp":  # its clients take no steps of their own
        values = {name: value for name, value in values.items() if name not in STEPS}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(data folder, run) of a small fedvpa-gp run."""
    folder = tmp_path_factory.mktemp("cli")
    data, out = write_groups(folder / "data"), folder / "run"
    os.environ["FEDVPA_CACHE"] = str(folder / "cache")
    more = {"rounds": 12, "population.structure": "groups", "population.order": 2}
    assert (
        main(["train", "--data", str(data), "--split", "train", *flags(tiny_model, out, **more)])
        == 0
    )
    return data, out


def test_evaluate_reports_every_documented_number(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    data, run = trained
    target = tmp_path / "eval.json"
    code = main(
        [
            "evaluate",
            str(run),
            "--data",
            str(data),
            "--split",
            "test",
            "--clients",
            "4",
            "--json",
            str(target),
        ]
    )
    assert code == 0
    found = json.loads(target.read_text())
    for name in ("own", "other_group", "shuffled", "prior_mean", "worst_group", "flipped"):
        assert set(found["accuracy"][name]) >= {"mean", "low", "high"}
        assert set(found["seen"]["accuracy"][name]) >= {"mean", "low", "high"}
    assert found["accuracy"]["own"]["mean"] > 0.9
    assert found["accuracy"]["other_group"]["mean"] < 0.1
    assert found["latent"]["ari"] == 1.0
    assert found["posterior"]["active_units"] >= 1
    assert found["few_shot"]["0"]["accuracy"]["mean"] == pytest.approx(
        found["accuracy"]["prior_mean"]["mean"], abs=0.3
    )
    page = (run / "report.html").read_text()
    assert page.count("<svg") >= 6
    assert "http" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")


def test_personalize_and_score_prefer_what_the_user_prefers(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = trained
    z, responses = tmp_path / "z.json", tmp_path / "r.jsonl"
    record = json.loads((data / "kind/test.jsonl").read_text().splitlines()[0])
    responses.write_text(
        "\n".join(
            json.dumps({"prompt": record["prompt"], "response": record[k]})
            for k in ("chosen", "rejected")
        )
    )
    for group, sign in (("kind", 1), ("blunt", -1)):
        assert (
            main(
                [
                    "personalize",
                    str(run),
                    "--pairs",
                    str(data / group / "test.jsonl"),
                    "--json",
                    str(z),
                ]
            )
            == 0
        )
        user = json.loads(z.read_text())
        assert user["nearest_group"] == group
        assert max(user["probability"]) > 0.9
        capsys.readouterr()
        assert (
            main(["score", str(run), "--z", str(z), "--responses", str(responses), "--json"]) == 0
        )
        first, second = json.loads(capsys.readouterr().out)["scores"]
        assert (first - second) * sign > 0
    z.write_text(json.dumps(json.loads(z.read_text()) | {"run": "another"}))
    assert main(["score", str(run), "--z", str(z), "--responses", str(responses)]) == 2
    assert "was inferred by another run" in capsys.readouterr().err
    z.write_text(json.dumps([0.0] * 3))
    assert main(["score", str(run), "--z", str(z), "--responses", str(responses)]) == 2
    assert "this run's latent has 4 dimensions" in capsys.readouterr().err
    assert main(["score", str(run), "--z", "prototype:9", "--responses", str(responses)]) == 2


BROKEN = {
    "missing-key.jsonl": json.dumps({"prompt": "p", "chosen": "a"}).encode(),
    "not-json.jsonl": b"{'prompt': 1}",
    "identical.jsonl": json.dumps(GOOD | {"rejected": "yes"}).encode(),
    "empty-reply.jsonl": json.dumps(GOOD | {"chosen": " "}).encode(),
    "other-prompt.jsonl": json.dumps(
        {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"}
    ).encode(),
    "wrong-types.jsonl": json.dumps(GOOD | {"chosen": 5}).encode(),
    "bytes.jsonl": b'{"prompt": "\xff\xfe", "chosen": "a", "rejected": "b"}',
    "empty.jsonl": b"",
    "truncated.jsonl.gz": gzip.compress(json.dumps(GOOD).encode() * 50)[:-12],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_name_and_line_and_nothing_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / name, tmp_path / "run"
    file.write_bytes(BROKEN[name])
    assert main(["train", "--data", str(file), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert f"{file}:1" in message
    assert "Traceback" not in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "federation.rounds: Input should be greater than 0"),
        (
            ["--method", "fedavg-btl", "--prior.kind", "peers"],
            "prior.kind is set but would not be read",
        ),
        (
            ["--method", "fedvpl", "--prior.weights", "uniform"],
            "prior.weights is set but would not be read: prior.kind is gaussian",
        ),
        (["--data", "nowhere/at/all.jsonl"], "nowhere/at/all.jsonl: no such file or folder"),
        (["--method", "fedvpl+ortho", "--prototypes.kind", "fixed"], "need a number of modes"),
        (["--tracker", "paper"], "tracker: Input should be 'none'"),
    ],
)
def test_bad_settings_end_with_two_and_say_which(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--out", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_unknown_flags_and_yaml_keys_are_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--round", "3"])
    assert stop.value.code == 2
    file = tmp_path / "c.yaml"
    file.write_text("federation: {round: 3}")
    assert main(["train", "--config", str(file), "--out", str(tmp_path / "run")]) == 2
    assert "federation.round: unknown setting (known here: rounds" in capsys.readouterr().err
    file.write_text("federation: [")
    assert main(["train", "--config", str(file)]) == 2


def test_a_used_directory_is_not_overwritten_and_an_empty_one_is_no_run(
    trained: tuple[Path, Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = trained
    assert main(["train", "--data", str(data), "--split", "train", *flags(tiny_model, run)]) == 2
    assert "continue an interrupted run with --resume" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), "--data", str(data)]) == 2
    assert "no run there" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(run), "--rounds", "99"]) == 2
    assert "other values for federation.rounds" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(run)]) == 0


def test_compare_is_resumable_and_pairs_methods_by_client(tiny_model: Path, tmp_path: Path) -> None:
    data, out = write_groups(tmp_path / "data"), tmp_path / "compare"
    arguments = [
        "compare", "--methods", "fedvpl,fedavg-btl", "--seeds", "0,1", "--data", str(data),
        "--split", "train",
        "--test-split", "test", "--unseen-clients", "4", "--context", "4", "--json",
        str(tmp_path / "t.json"),
        *flags(tiny_model, out, **{"rounds": 15, "learning-rate": 0.02}),
    ]  # fmt: skip
    assert main(arguments) == 0
    table = json.loads((tmp_path / "t.json").read_text())
    row = {r["row"]: r for r in table["settings"][0]["rows"]}
    assert row["fedavg-btl"]["difference_unseen"]["n"] == 2
    assert row["fedavg-btl"]["difference_unseen"]["mean"] < -0.2
    assert (out / "results.csv").read_text().count("\n") == 5
    before = (out / "fedvpl-seed1/checkpoint.safetensors").stat().st_mtime_ns
    (out / "fedvpl-seed0/eval.json").unlink()
    assert main(arguments) == 0
    assert (out / "fedvpl-seed1/checkpoint.safetensors").stat().st_mtime_ns == before
    assert (out / "fedvpl-seed0/eval.json").is_file()
    assert main(["compare", "--methods", "fedvlp", *arguments[3:]]) == 2


INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from fedvpa.cli.main import main
sys.exit(main())
"""
"""As a terminal starts it: tests that run in the background ignore SIGINT, which is inherited."""


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_resumes_to_the_same_bits(
    stop: signal.Signals, tiny_model: Path, tmp_path: Path
) -> None:
    data = write_groups(tmp_path / "data")
    environment = os.environ | {"FEDVPA_CACHE": str(tmp_path / "cache")}

    def command(out: Path) -> list[str]:
        more = {"rounds": 300, "prototypes.start_round": 20}
        rest = ["--data", str(data), "--split", "train", *flags(tiny_model, out, **more)]
        return [sys.executable, "-c", INTERRUPTIBLE, "train", *rest]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(whole), env=environment, check=True, capture_output=True)
    process = subprocess.Popen(command(broken), env=environment, stderr=subprocess.PIPE, text=True)
    checkpoint = broken / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(stop)
    _, message = process.communicate(timeout=60)
    assert process.returncode == (1 if stop is signal.SIGINT else -9), message
    assert "Traceback" not in message
    assert 0 < load_checkpoint(checkpoint).state.round < 300
    resume = [sys.executable, "-m", "fedvpa.cli.main", "train", "--resume", "--out", str(broken)]
    subprocess.run(resume, env=environment, check=True, capture_output=True)
    assert checkpoint.read_bytes() == (whole / "checkpoint.safetensors").read_bytes()
    assert not [p for p in broken.iterdir() if p.name.startswith(".")] or stop is signal.SIGKILL


def test_personas_are_written_with_their_truth_and_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p"
    assert (
        main(
            [
                "data",
                "personas",
                "--out",
                str(out),
                "--users",
                "4",
                "--groups",
                "4",
                "--pairs",
                "5",
                "--quiet",
            ]
        )
        == 0
    )
    assert len(json.loads((out / "truth.json").read_text())["vectors"]) == 14
    capsys.readouterr()
    assert (
        main(
            [
                "data",
                "inspect",
                str(out),
                "--split",
                "train",
                "--test-split",
                "test",
                "--json",
                "--quiet",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["pairs"], found["clients"], len(found["groups"])) == (20, 4, 4)
    assert found["leaks"]["pairs"] == 0
    assert main(["data", "personas", "--out", str(out)]) == 2


def test_a_federation_s_project_is_whole_or_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "p.jsonl"
    pairs.write_text("{}\n")
    named = ["--client", f"a={pairs}", "--client", f"b={pairs}"]
    for arguments, message in (
        (["--trial", "--method", "fedavg-btl"], "does not run as a federation"),
        ([], "name the clients with --client"),
        (["--client", "a=nowhere"], "a file or folder that exists"),
        ([*named, "--client", f"a={pairs}"], "'a' is given twice"),
        (["--client", f"a b={pairs}"], "letters, digits"),
        (
            [*named, "--secure", "--method", "fedvpl+mix", "--prior.kind", "peers"],
            "secure: only sums",
        ),
        ([*named, "--rounds", "0"], "federation.rounds"),
    ):
        assert main(["federation", "init", str(tmp_path / "f"), *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "f").exists()
    assert (
        main(["federation", "init", str(tmp_path / "f"), *named, "--rounds", "7", "--quiet"]) == 0
    )
    settings = yaml.safe_load((tmp_path / "f" / "server.yaml").read_text())
    assert settings["training"] == {"method": "fedvpa-gp", "federation": {"rounds": 7}}
    private = ["--privacy.enabled", "true", "--public", str(pairs), "--quiet"]
    noise = ["--privacy.fit_noise", "0.1"]
    assert main(["federation", "init", str(tmp_path / "p"), *named, *private, *noise]) == 0
    settings = yaml.safe_load((tmp_path / "p" / "server.yaml").read_text())
    assert settings["training"]["method"] == "fedvpa-gp"
    assert settings["training"]["privacy"] == {"enabled": True, "fit_noise": 0.1}
    public = ["--public", str(pairs), "--validation-share", "0.2", "--quiet"]
    assert main(["federation", "init", str(tmp_path / "g"), *named, *public]) == 0
    written = yaml.safe_load((tmp_path / "g" / "server.yaml").read_text())["training"]
    assert written["data"] == {"public": str(pairs), "validation_share": 0.2}
    assert (tmp_path / "f" / "clients" / "a" / "node.key").stat().st_mode & 0o077 == 0
    assert main(["federation", "init", str(tmp_path / "f"), *named]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["server", str(tmp_path / "f" / "clients")]) == 2
    assert main(["client", str(tmp_path / "f")]) == 2
    (tmp_path / "f" / "clients" / "a" / "node.key").unlink()
    assert main(["client", str(tmp_path / "f" / "clients" / "a")]) == 2
    assert "node.key: no such file" in capsys.readouterr().err


def test_a_privacy_plan_keeps_to_its_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ["privacy", "plan", "--clients", "500", "--cohort", "50", "--rounds", "10", "--quiet"]
    assert main([*plan, "--epsilon", "6", "--json", str(tmp_path / "plan.json")]) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["path"][-1] == {"round": 10, "epsilon": pytest.approx(6, rel=0.02)}
    for arguments, message in (
        (["--epsilon", "0"], "above 0"),
        (["--epsilon", "5", "--delta", "0.1"], "is no privacy"),
    ):
        assert main([*plan, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_run_is_known_by_its_comparisons_and_not_by_the_last_bits_of_its_features(
    tiny_model: Path, pair_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Features that are computed again in other batches differ in their last bits."""
    out = tmp_path / "run"
    assert (
        main(["train", "--data", str(pair_file), "--split", "train", *flags(tiny_model, out)]) == 0
    )
    cache = Path(os.environ["FEDVPA_CACHE"]) / "features.sqlite"
    with closing(sqlite3.connect(cache)) as database:
        rows = database.execute("SELECT key, notes, value FROM text").fetchall()
        moved = [
            (new, zlib.crc32(new, notes), key)
            for key, notes, value in rows
            for new in [(np.frombuffer(value, "<f4") * np.float32(1 + 1e-6)).tobytes()]
        ]
        database.executemany("UPDATE text SET value = ?, checksum = ? WHERE key = ?", moved)
        database.commit()
    evaluation = [
        "evaluate",
        str(out),
        "--data",
        str(pair_file),
        "--split",
        "test",
        "--clients",
        "2",
    ]
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert main(evaluation) == 0
    file = pair_file / "kind" / "train.jsonl"
    file.write_text(file.read_text().replace("please help", "do help", 1))
    assert main(evaluation) == 2
    assert "have changed since it was trained" in capsys.readouterr().err
