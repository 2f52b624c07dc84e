"""Settings, devices and names that cannot be: a sentence and exit code 2, never a traceback, and no
request to anybody."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml

from fedvpa.cli.main import main
from fedvpa.config import build_config, what_is_read
from fedvpa.methods import METHODS
from fedvpa.parts import SOURCES


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("method: [a]", "method: Input should be a valid string"),
        ("method: {a: 1}", "method"),
        ("preset: [paper]", "preset"),
        ("seed: " + "9" * 5000, "not YAML"),
        ("seed: " + "9" * 400, "seed: Input should be"),
        ("seed: 4294967296", "seed: Input should be less than 4294967296"),
        ("a: " + "[" * 3000, "not YAML"),
        ("data: 3", "data"),
        ("data: {clients: yes}", "data.clients: 'true' is no value of it"),
        ("seed: 1\nseed: 2", "'seed' stands twice"),
        ("- 1", "expected a mapping of settings"),
        ("a: \x01", "not YAML"),
        ("data: {columns: {client_id: 3}}", "data.columns.client_id"),
        ("data: {source: x.jsonl, columns: {who: b}}", "columns: no field 'who'"),
        ("federation: {local_steps: 1000000000}", "local_steps: Input should be less than or"),
        ("model: {inputs: .nan}", "model.inputs"),
        ("objective: {kl_weight: .nan}", "objective.kl_weight"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    for source in ([], ["--data", str(tmp_path / "x.jsonl")]):
        command = ["train", "--config", str(file), *source, "--out", str(tmp_path / "run")]
        assert main(command) == 2
        said = capsys.readouterr().err
        assert says in said or "x.jsonl" in said
        assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--device", "foo"], "device 'foo': not a torch device"),
        (["--device", "cuda:64"], "this machine (or this build of torch) has"),
        (
            ["--method", "fedvpl+anchors", "--rounds", "1"],
            "give 2 rounds or more, or --method fedvpl",
        ),
        (["--local-steps", "1e9"], "local_steps"),
        (["--backbone", "my/model"], "write hf://my/model"),
        (["--backbone", "./nothing"], "there is no such folder"),
        (["--backbone", "~nosuchuser/model"], "there is no such folder"),
        (["--backbone", "a" * 5000], "there is no such folder"),
        (["--column", "client_id"], "'client_id' is not FIELD=COLUMN"),
        (["--objective.kl-weight", "nan"], "objective.kl_weight"),
    ],
)
def test_flags_that_cannot_be_are_refused_without_a_request(
    flags: list[str], says: str, tmp_path: Path, pair_file: Path, tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def refuse(*_: object) -> None:
        raise AssertionError("a request")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    command = ["train", "--data", str(pair_file), "--split", "train", "--out",
               str(tmp_path / "run"), "--backbone", str(tiny_model), *flags]  # fmt: skip
    assert main(command) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", [["--mix", "a=nan"], ["--mix", "a=inf"], ["--temperature", "nan"], ["--seed", "-1"],
             ["--seed", "4294967296"], ["--seed", "\u00b2"], ["--top-p", "nan"]]
)  # fmt: skip
def test_numbers_that_are_none_are_refused(flag: list[str], tmp_path: Path) -> None:
    command = ["generate", str(tmp_path), "--prompts", "personas", "--responses", "x", *flag]
    try:
        code = main(command)
    except SystemExit as error:  # argparse
        code = int(str(error.code))
    assert code == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_what_a_run_writes_can_be_given_again(method: str, preset: str) -> None:
    for source in (*SOURCES, "pairs.jsonl"):
        given = {"method": method, "preset": preset, "data": {"source": source}}
        config = build_config(given, {"federation": {"rounds": 7}, "seed": 3})
        assert build_config(yaml.safe_load(yaml.safe_dump(what_is_read(config)))) == config
