"""Every file of the corpus gives what its row says, by the reader and by the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedvpa.cli.main import main
from fedvpa.data.reading import read_pairs
from fedvpa.errors import BadInputError
from tests.corpus.files import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_files_as_people_have_them(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = case.write(tmp_path)
    if case.refused:
        with pytest.raises(BadInputError) as error:
            read_pairs(path, **case.options)
        assert case.refused in str(error.value)
        assert str(error.value).startswith((str(path), "columns"))
        if not case.options:
            assert main(["data", "inspect", str(path)]) == 2
            assert case.refused in capsys.readouterr().err
        return
    found = read_pairs(path, **case.options)
    got = [([tuple(m) for m in p.prompt], p.chosen, p.rejected) for p in found.pairs]
    if case.pairs is not None:
        assert got == case.pairs
    assert len(got) == (case.count if case.pairs is None else len(case.pairs))
    assert case.skipped == found.skipped
    if case.clients is not None:
        assert [p.client_id for p in found.pairs] == case.clients
    assert case.noted in "\n".join(found.notes)
    if not case.options:
        assert main(["data", "inspect", str(path)]) == 0
        assert case.noted in capsys.readouterr().err


def test_an_unreadable_folder_is_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    (tmp_path / "secret").mkdir()
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    real = os.scandir

    def scan(place: str) -> object:  # root may read everything
        if str(place).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(BadInputError, match="secret: cannot be read: Permission denied"):
        read_pairs(tmp_path)


def test_what_looks_like_a_path_is_never_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("a request")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("my/pairs", "pairs", "./x", "a.jsonl", "~nosuchuser/x", "a\0b"):
        with pytest.raises(BadInputError, match=r"no such file or folder|not a path"):
            read_pairs(name)
    with pytest.raises(BadInputError, match=r"for a dataset of the Hub, write hf://my/pairs"):
        read_pairs("my/pairs")


REFUSED = [case for case in CASES if case.refused and not case.options]
READ = [case for case in CASES if not case.refused and not case.options]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_every_command_refuses_what_the_reader_refuses(
    case: Case, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = str(case.write(tmp_path)), str(runs / "one")
    for command in (
        ["train", "--data", path, "--out", str(tmp_path / "out")],
        ["evaluate", run, "--data", path],
        ["personalize", run, "--pairs", path],
        ["preferences", run, "--data", path],
    ):
        assert main([*command, "--quiet"]) == 2, command
        said = capsys.readouterr().err
        assert case.refused in said
        assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_a_user_is_served_from_every_file_that_is_read(
    case: Case, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDVPA_CACHE", str(runs / "cache"))
    path, me = str(case.write(tmp_path)), tmp_path / "me.json"
    if "unread-people" in case.name or case.count < 9:
        skip = ["personalize", str(runs / "one"), "--pairs", path, "--json", str(me), "--quiet"]
        assert main(skip) == 0
        assert me.is_file()


@pytest.mark.parametrize("name", ["twice.jsonl", "two-dialects.jsonl", "cut.arrow"])
def test_prompts_of_files_that_are_refused_are_refused(
    name: str, runs: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = next(case for case in CASES if case.name == name)
    path, out = str(case.write(tmp_path)), str(tmp_path / "out")
    align = ["align", str(runs / "one"), "--prompts", path, "--base", str(tiny_model), "--out", out]
    assert main([*align, "--quiet"]) == 2
    assert case.refused in capsys.readouterr().err


def test_responses_are_read_by_lines_that_end_at_a_newline_alone(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.jsonl"
    text = '\ufeff{"prompt": "tea\u2028?", "response": "yes\u0085"}\n'
    file.write_text(text + '{"prompt": "tea?", "response": "no"}\n', encoding="utf-8")
    command = ["score", str(runs / "one"), "--z", "mean", "--json", "--responses"]
    assert main([*command, str(file)]) == 0
    assert len(json.loads(capsys.readouterr().out)["scores"]) == 2
    for z in ("prototype:\u00b2", "prototype:" + "9" * 400, "[nan]", "~nosuchuser/z"):
        command[3] = z
        assert main([*command, str(file)]) == 2
