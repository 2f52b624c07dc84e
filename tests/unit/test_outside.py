"""What comes from outside and what goes there: names as file names, files with their modes, text on
a terminal, addresses of others."""

from __future__ import annotations

import http.server
import io
import json
import logging
import os
import stat
import sys
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedvpa.cli.main import main
from fedvpa.console import Reporter, emit_json
from fedvpa.data.reading import read_pairs
from fedvpa.errors import RecordError
from fedvpa.files import file_name, private_file, write_atomically
from fedvpa.foreign import OneLine, harmless, harmless_lines
from fedvpa.winrate.endpoint import EndpointJudge
from fedvpa.winrate.judges import JudgeError
from tests.conftest import endpoint, write_groups


@pytest.fixture
def umask() -> Any:
    """Sets the umask for a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path: Path) -> int:
    """Permissions of a file."""
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_new_file_has_the_mode_of_the_umask_and_a_private_one_is_the_user_s(
    mask: int, tmp_path: Path, umask: Callable[[int], int]
) -> None:
    umask(mask)
    write_atomically(tmp_path / "new", b"x")
    assert mode(tmp_path / "new") == 0o666 & ~mask
    write_atomically(tmp_path / "mine", b"x", private=True)
    assert mode(tmp_path / "mine") == 0o600
    assert mode(private_file(tmp_path / "log")) == 0o600


def test_an_existing_file_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("before")
    for given_mode in (0o600, 0o640, 0o755):
        file.chmod(given_mode)
        write_atomically(file, b"after")
        assert mode(file) == given_mode
    write_atomically(file, b"secret", private=True)
    assert mode(file) == 0o700


def test_a_private_file_is_never_open_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: Callable[[int], int]
) -> None:
    """Not even for the moment before its mode is set."""
    umask(0)
    seen, replace = list[int](), os.replace

    def look(source: Path, target: Path) -> None:
        seen.append(mode(Path(source)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    monkeypatch.setattr(
        os, "fsync", lambda handle: seen.append(stat.S_IMODE(os.fstat(handle).st_mode))
    )
    write_atomically(tmp_path / "key", b"x", private=True)
    assert seen == [0o600, 0o600]


def test_links_devices_and_pipes_are_written_through(tmp_path: Path) -> None:
    real, link = tmp_path / "real" / "out.json", tmp_path / "link.json"
    real.parent.mkdir()
    real.write_text("before")
    link.symlink_to(real)
    emit_json(str(link), {"a": 1})
    assert link.is_symlink()
    assert json.loads(real.read_text()) == {"a": 1}
    pipe, got = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    emit_json(str(pipe), {"a": 2})
    reader.join(10)
    assert json.loads(got[0]) == {"a": 2}
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    emit_json("/dev/null", {"a": 3})
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "there.json")
    emit_json(str(dangling), {"a": 4})
    assert dangling.is_symlink()
    assert json.loads((tmp_path / "there.json").read_text()) == {"a": 4}


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("before")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@given(st.text() | st.sampled_from(["..", ".", "", "/etc/x", "a/../../b", "CON", "x" * 500, "\0"]))
def test_any_name_makes_a_file_name_that_stays_in_its_folder(name: str) -> None:
    made = file_name(name)
    assert 0 < len(made.encode()) <= 80
    assert (Path("folder") / made).resolve().parent == Path("folder").resolve()
    assert not made.startswith((".", "-"))
    assert made.isprintable()


@given(st.lists(st.text(), unique=True))
def test_other_names_make_other_file_names(names: list[str]) -> None:
    assert len({file_name(name) for name in names}) == len(names)


@given(st.text())
def test_harmless_text_is_one_short_line_that_does_nothing(text: str) -> None:
    shown = harmless(text)
    assert len(shown) <= 201
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    assert not set(shown) & set("\n\r\x1b\x07\x08\u202e\u2028")
    for line in harmless_lines(text).split("\n"):
        assert not set(line) & set("\r\x1b\x07\x08\u202e\u2028")


def test_a_log_and_a_table_show_foreign_text_on_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(OneLine("%(message)s"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    try:
        raise ValueError("a\n12:00:00 finished: {}\x1b[2J")
    except ValueError:
        logger.exception("client %s", "x\n12:00:00 finished: {}")
    said = stream.getvalue()
    assert "\n12:00:00" not in said
    assert "\x1b" not in said
    reporter = Reporter(quiet=False)
    reporter.table("t", ["group"], [["evil\n\x1b[2J[bold]x"]])
    reporter.say("group \x1b]0;owned\x07 here")
    assert "\x1b" not in capsys.readouterr().err


def test_a_log_is_the_user_s_and_does_not_grow_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: Callable[[int], int]
) -> None:
    """Whatever others make a server write."""
    pytest.importorskip("flwr")
    from fedvpa.network import superlink

    umask(0)
    monkeypatch.setattr(superlink, "MOST_LOG", 2000)
    handler = superlink.Rotated(tmp_path / "server.log")
    for i in range(300):
        handler.emit(logging.makeLogRecord({"msg": f"{i} " + "x" * 50}))
    handler.close()
    files = list(tmp_path.iterdir())
    assert len(files) == 3
    assert sum(f.stat().st_size for f in files) < 6200
    assert {mode(f) for f in files} == {0o600}


@pytest.mark.parametrize("key", ["client_id", "group"])
@pytest.mark.parametrize("name", ["a\nb", "\x1b[2Jx", "x" * 500, "\u202eabc"])
def test_names_in_data_are_plain(key: str, name: str, tmp_path: Path) -> None:
    record = {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No.", key: name}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(RecordError, match=f"control characters, or too many, in '{key}'"):
        read_pairs(str(tmp_path / "pairs.jsonl"))


def test_names_in_a_plan_do_not_lead_out_of_the_directory(tmp_path: Path, tiny_model: Path) -> None:
    groups = write_groups(tmp_path / "data", 24, 12)
    rounds = {"rounds": 2, "local_steps": 1}
    train = {
        "data": {"source": str(groups), "split": "train", "clients": 4}, "federation": rounds,
        "features": {"backbone": str(tiny_model), "layer": 2}, "model": {"inputs": 4},
    }  # fmt: skip
    test = {"split": "test", "clients": 2, "context": 2, "repeats": 1}
    setting = {"train": train, "test": test, "rows": ["/abs/../row"]}
    plan = {
        "seeds": [0], "rows": {"/abs/../row": {"method": "fedavg-btl"}},
        "settings": {"../../outside": setting},
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    before = set(tmp_path.iterdir())
    out = tmp_path / "a" / "b" / "out"
    assert (
        main(["compare", "--plan", str(tmp_path / "plan.yaml"), "--out", str(out), "--quiet"]) == 0
    )
    assert set(tmp_path.iterdir()) - before == {tmp_path / "a"}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["out"]
    assert "../../outside" in (out / "results.csv").read_text()  # the true name


def test_a_key_is_not_sent_where_an_endpoint_redirects_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with endpoint(lambda _: (200, {})) as (other, asked):

        class Redirect(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the base class looks for this name
                self.send_response(307)
                self.send_header("Location", f"{other}/chat/completions")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirect)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            judge = EndpointJudge(f"http://127.0.0.1:{server.server_port}/v1", "m", {"kind": "k"})
            with pytest.raises(JudgeError, match="is redirected to"):
                judge.compare("kind", [()], ["x"], ["y"])
        finally:
            server.shutdown()
            server.server_close()
        assert not asked
        assert judge.usage.requests <= 2


@pytest.mark.parametrize(
    "usage", [None, {}, {"prompt_tokens": None}, [1], "x", {"prompt_tokens": -1}]
)
def test_an_endpoint_need_not_count_tokens(usage: Any) -> None:
    body = {"choices": [{"message": {"content": "A"}}], "usage": usage}
    with endpoint(lambda _: (200, body)) as (url, _):
        judge = EndpointJudge(url, "m", {"kind": "k"})
        assert judge.compare("kind", [()], ["x"], ["y"]) == [0.5]
        assert judge.usage.prompt_tokens == 0


def test_an_error_is_printed_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "x\x1b[2J.jsonl"
    assert main(["data", "inspect", str(bad)]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert said.count("\n") == 1
    assert sys.stderr is not None
