"""The server as its clients see it: OpenAI's client, users, keys, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fedvpa.data.reading import read_pairs
from fedvpa.errors import BadInputError
from fedvpa.records import Message
from fedvpa.serving.access import new_key
from fedvpa.serving.model import Served, open_served
from fedvpa.serving.serve import bound, check
from fedvpa.serving.settings import ServingSettings
from fedvpa.serving.store import Store
from tests.serving import make_policy, make_run, serving

ASK = [{"role": "user", "content": "is tea very good"}]
GREEDY: dict[str, Any] = {"messages": ASK, "temperature": 0, "max_tokens": 12}
SECRET = "openssl rand -hex 32 writes something like this"


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, `other` (of another seed), `policy`, and `data`."""
    folder = tmp_path_factory.mktemp("serving")
    os.environ["FEDVPA_CACHE"] = str(folder / "cache")
    run = make_run(folder, tiny_model)
    make_run(folder / "more", tiny_model, seed=1)
    make_policy(folder / "policy", tiny_model, run)
    (folder / "secret").write_text(SECRET)
    return folder


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[tuple[str, Served]]:
    store = f"sqlite:///{place / 'module.db'}"
    bank = str(place / "data" / "kind" / "test.jsonl")
    with serving(
        place / "policy", store=store, secret=str(place / "secret"), bank=bank, rate=6000
    ) as found:
        yield found


@pytest.fixture
def http(server: tuple[str, Served]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server[0], timeout=30) as client:
        yield client


@pytest.fixture
def client(server: tuple[str, Served]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


def pairs_of(place: Path, group: str) -> list[dict[str, Any]]:
    pairs = read_pairs(str(place / "data" / group / "test.jsonl")).pairs
    return [
        {"messages": [m._asdict() for m in p.prompt], "chosen": p.chosen, "rejected": p.rejected}
        for p in pairs
    ]


# -- OpenAI's API


def test_openai_s_client_lists_models_and_has_answers_under_each(client: openai.OpenAI) -> None:
    names = [m.id for m in client.models.list()]
    assert names == ["fedvpa/base", "fedvpa/blunt", "fedvpa/kind", "fedvpa/mine", "fedvpa/neutral"]
    assert client.models.retrieve("fedvpa/kind").owned_by == "fedvpa"
    answers = {}
    for name in ("fedvpa/base", "fedvpa/kind", "fedvpa/blunt"):
        found = client.chat.completions.create(model=name, **GREEDY)
        answers[name] = found.choices[0].message.content
        assert found.object == "chat.completion"
        assert found.choices[0].finish_reason in ("stop", "length")
        assert found.usage is not None
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
        assert found.usage.completion_tokens <= 12
    assert len(set(answers.values())) == 3


def test_a_stream_is_the_same_answer_and_says_under_what_it_was_drawn(
    client: openai.OpenAI, server: tuple[str, Served]
) -> None:
    whole = client.chat.completions.create(model="fedvpa/kind", **GREEDY)
    parts = list(client.chat.completions.create(
        model="fedvpa/kind", stream=True, stream_options={"include_usage": True}, **GREEDY
    ))  # fmt: skip
    text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    assert text == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert [p.choices[0].finish_reason for p in parts if p.choices][-1] in ("stop", "length")
    assert parts[-1].usage == whole.usage
    said = parts[0].model_extra["preference"]  # type: ignore[index]
    assert said == whole.model_extra["preference"]  # type: ignore[index]
    assert said["source"] == "name"
    assert said["z"] == pytest.approx(server[1].named["kind"].tolist(), abs=1e-5)


def test_answers_side_by_side_seeds_and_stops(client: openai.OpenAI) -> None:
    hot: dict[str, Any] = {"messages": ASK, "temperature": 1.5, "max_tokens": 10, "seed": 3}
    first, again = (
        client.chat.completions.create(model="fedvpa/base", n=3, **hot) for _ in range(2)
    )
    texts = [c.message.content for c in first.choices]
    assert texts == [c.message.content for c in again.choices]
    assert len(set(texts)) > 1
    other = client.chat.completions.create(model="fedvpa/base", **(hot | {"seed": 99}))
    assert other.choices[0].message.content not in texts
    long = client.chat.completions.create(model="fedvpa/kind", **GREEDY).choices[0].message.content
    assert long is not None
    word = long.split()[-1]
    cut = client.chat.completions.create(model="fedvpa/kind", stop=[word], **GREEDY).choices[0]
    assert cut.message.content == long[: long.index(word)]
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        ({"model": "gpt-5"}, 404, "model_not_found", "known: fedvpa/base, fedvpa/blunt"),
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "assistant", "content": "yes"}]}, 400, "invalid_value", "user's"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "invalid_value", "empty"),
        ({"temperature": 9}, 400, "invalid_value", "temperature"),
        ({"n": 99}, 400, "invalid_value", "n: "),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "invalid_value", "stop"),
        ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "format"),
        ({"model": "fedvpa/base", "best_of": 4}, 400, "invalid_value", "best_of"),
        ({"model": "fedvpa/mine"}, 400, "missing_user", "user"),
        ({"preference": {"mix": {"kind": -1}}}, 400, "invalid_value", "not negative"),
        ({"preference": {"mix": {"rude": 1}}}, 400, "invalid_value", "no preference 'rude'"),
        ({"preference": {"z": [1.0]}}, 400, "invalid_value", "4 finite numbers"),
        ({"preference": {"z": [1, 2, 3, 4], "name": "kind"}}, 400, "invalid_value", "one of"),
        ({"preference": {"name": "rude"}}, 400, "invalid_value", "no preference 'rude'"),
        ({"preference": {"token": "a.b"}}, 400, "bad_token", "not signed"),
        ({"messages": [{"role": "user", "content": "tea " * 300}]}, 400,
         "context_length_exceeded", "context"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_an_error_as_openai_has_it(
    body: dict[str, Any], status: int, code: str, message: str, http: httpx.Client
) -> None:
    given = {"model": "fedvpa/kind", **GREEDY} | body
    found = http.post("/v1/chat/completions", json=given)
    assert found.status_code == status
    error = found.json()["error"]
    assert error["code"] == code
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_bodies_that_are_none_and_paths_that_are_not_there(http: httpx.Client) -> None:
    head = {"content-type": "application/json"}
    for content in (b"{", b"", b"\xff\xfe", b"[1]"):
        found = http.post("/v1/chat/completions", content=content, headers=head)
        assert found.status_code == 400
        assert found.json()["error"]["type"] == "invalid_request_error"
    large = http.post("/v1/chat/completions", content=b"x" * (1 << 20) + b"y", headers=head)
    assert large.status_code == 413

    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * (1 << 16)

    assert http.post("/v1/chat/completions", content=endless(), headers=head).status_code == 413
    assert http.get("/v1/nothing").json()["error"]["message"] == "Not Found"
    assert http.get("/v1/chat/completions").status_code == 405
    assert http.get("/health").json()["status"] == "ok"


def test_a_web_page_elsewhere_cannot_ask_by_a_name_of_its_own(server: tuple[str, Served]) -> None:
    url = f"{server[0]}/v1/users/ann"
    found = httpx.get(url, headers={"host": "evil.example:8000"})
    assert (found.status_code, found.json()["error"]["code"]) == (421, "wrong_host")
    assert httpx.get(url, headers={"host": "localhost:8000"}).status_code == 200
    # what a form of another page can send is no JSON
    form = {"content-type": "text/plain", "origin": "https://evil.example"}
    body = json.dumps({"model": "fedvpa/kind", **GREEDY})
    sent = httpx.post(f"{server[0]}/v1/chat/completions", content=body, headers=form)
    assert sent.status_code == 400
    assert "access-control-allow-origin" not in sent.headers


def test_who_hangs_up_frees_the_engine(http: httpx.Client, server: tuple[str, Served]) -> None:
    engine = server[1].engine
    engine._policy.stops = []  # type: ignore[attr-defined]
    try:
        body = {"model": "fedvpa/kind", "messages": ASK, "max_tokens": 200, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as stream:
            next(stream.iter_lines())
        before = engine.load["tokens"]
        for _ in range(100):
            if not engine.load["running"]:
                break
            time.sleep(0.05)
        assert engine.load["running"] == 0
        assert engine.load["tokens"] < before + 190
    finally:
        engine._policy.stops = [1]  # type: ignore[attr-defined]


# -- users


def test_a_user_s_choices_move_the_posterior_and_the_answer(
    http: httpx.Client, place: Path, server: tuple[str, Served]
) -> None:
    mine = {"model": "fedvpa/mine", "user": "ann", **GREEDY}
    before = http.post("/v1/chat/completions", json=mine).json()
    assert before["preference"]["pairs"] == 0
    for pair in pairs_of(place, "blunt")[:8]:
        found = http.post("/v1/users/ann/comparisons", json=pair).json()
        assert found["added"] == 1
    assert found["shares"]["blunt"] > 0.95
    assert found["certain"]
    assert "'blunt' comes nearest" in found["words"]
    after = http.post("/v1/chat/completions", json=mine).json()
    assert after["preference"]["z"] == pytest.approx(found["z"], abs=1e-5)
    assert after["choices"][0]["message"] != before["choices"][0]["message"]
    # the same choice again changes nothing; the opposite one takes its place
    again = http.post("/v1/users/ann/comparisons", json=pair).json()
    assert again["added"] == 0
    turned = {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
    other = http.post("/v1/users/ann/comparisons", json=turned).json()
    assert other["added"] == 1
    assert other["surprise"] > found["surprise"]
    shown = http.get("/v1/users/ann").json()
    assert len(shown["comparisons"]) == shown["pairs"] == 8
    assert shown["comparisons"][0]["chosen"] == pairs_of(place, "blunt")[0]["chosen"]
    moved = {row["id"]: row["moved"] for row in shown["comparisons"]}
    assert shown["moved_most"] == max(moved, key=moved.__getitem__)
    # undo, export, forget
    assert http.delete("/v1/users/ann/comparisons/last").json()["pairs"] == 7
    number = shown["comparisons"][0]["id"]
    assert http.delete(f"/v1/users/ann/comparisons/{number}").json()["pairs"] == 6
    assert http.delete(f"/v1/users/ann/comparisons/{number}").status_code == 404
    export = http.get("/v1/users/ann/export")
    assert "ann.json" in export.headers["content-disposition"]
    assert len(export.json()["kept"]) == 6
    assert http.delete("/v1/users/ann").json() == {"user": "ann", "deleted": True}
    assert http.delete("/v1/users/ann").json() == {"user": "ann", "deleted": False}
    gone = http.get("/v1/users/ann").json()
    assert gone["pairs"] == 0
    assert gone["comparisons"] == []
    for file in place.glob("module.db*"):
        assert b"please help" not in file.read_bytes()


def test_questions_are_asked_by_what_their_answers_tell(http: httpx.Client) -> None:
    gains, asked = [], set[int]()
    for _ in range(4):
        question = http.get("/v1/users/bob/next").json()
        gains.append(question["information"])
        asked.add(question["question"])
        # Bob is kind
        choice = "a" if question["a"].startswith("please") else "b"
        answer = {"question": question["question"], "choice": choice}
        found = http.post("/v1/users/bob/comparisons", json=answer).json()
        assert found["added"] == 1
    assert len(asked) == 4
    assert gains[0] > gains[-1] >= 0
    assert found["shares"]["kind"] > 0.9
    alike = http.get("/v1/users/bob/next").json()["question"]
    tie = {"question": alike, "choice": "tie"}
    assert http.post("/v1/users/bob/comparisons", json=tie).json()["added"] == 0
    other = http.get("/v1/users/bob/next", params={"skip": [alike]}).json()["question"]
    assert other not in (alike, *asked)
    none = http.get("/v1/users/bob/next", params={"skip": list(range(24))}).json()
    assert none["error"]["code"] == "all_answered"


def test_preferences_under_names_of_one_s_own(http: httpx.Client) -> None:
    mix = {"preference": {"mix": {"kind": 3, "blunt": 1}}}
    saved = http.put("/v1/users/eve/preferences/monday", json=mix).json()
    asked = {"model": "fedvpa/neutral", "user": "eve", "preference": {"name": "monday"}, **GREEDY}
    found = http.post("/v1/chat/completions", json=asked).json()
    assert found["preference"]["source"] == "saved"
    assert found["preference"]["z"] == pytest.approx(saved["z"], abs=1e-5)
    outright = {"model": "fedvpa/base", **mix, **GREEDY}
    same = http.post("/v1/chat/completions", json=outright).json()
    assert same["choices"][0]["message"] == found["choices"][0]["message"]
    assert http.get("/v1/users/eve").json()["saved"] == ["monday"]
    assert http.put("/v1/users/eve/preferences/kind", json=mix).status_code == 400
    other = http.post("/v1/chat/completions", json=asked | {"user": "adam"})
    assert other.status_code == 400
    assert http.delete("/v1/users/eve/preferences/monday").json()["deleted"]
    assert http.delete("/v1/users/eve/preferences/monday").status_code == 404


def test_a_preference_may_stay_with_its_user(
    http: httpx.Client, place: Path, server: tuple[str, Served], tiny_model: Path
) -> None:
    body = {"comparisons": pairs_of(place, "kind")[:6]}
    found = http.post("/v1/preferences", json=body).json()
    assert found["shares"]["kind"] > 0.9
    asked = {"model": "fedvpa/neutral", **GREEDY}
    token = {"preference": {"token": found["token"]}}
    answer = http.post("/v1/chat/completions", json=asked | token).json()
    assert answer["preference"]["z"] == pytest.approx(found["z"], abs=1e-5)
    tampered = {"preference": {"token": "A" + found["token"][1:]}}
    assert http.post("/v1/chat/completions", json=asked | tampered).status_code == 400
    # another run's server knows the secret, but not what this z means
    where = f"sqlite:///{place / 'other.db'}"
    secret = str(place / "secret")
    with serving(place / "more" / "run", store=where, secret=secret, best_of=1) as (url, _):
        refused = httpx.post(f"{url}/v1/chat/completions", json=asked | token)
        assert refused.status_code == 409
        assert "another run" in refused.json()["error"]["message"]
        assert "send the comparisons" in refused.json()["error"]["message"]


def test_a_run_without_a_policy_serves_the_best_of_its_base_model_s_drafts(place: Path) -> None:
    store = f"sqlite:///{place / 'run.db'}"
    with serving(place / "run", store=store, rate=6000) as (url, served):
        body = {"messages": ASK, "temperature": 1.5, "max_tokens": 6, "seed": 5}
        with httpx.Client(base_url=url, timeout=30) as http:
            found = http.post("/v1/chat/completions", json={"model": "fedvpa/kind", **body}).json()
            assert found["preference"]["best_of"] == 4
            drafts = http.post(
                "/v1/chat/completions", json={"model": "fedvpa/base", "n": 4, **body}
            ).json()
            texts = [c["message"]["content"] for c in drafts["choices"]]
            prompt = [Message(m["role"], m["content"]) for m in ASK]
            reward = served.people.rewards(prompt, texts, served.named["kind"])
            best = texts[max(range(4), key=reward.__getitem__)]
            assert found["choices"][0]["message"]["content"] == best
            assert found["usage"]["completion_tokens"] == drafts["usage"]["completion_tokens"]
            stream = {"model": "fedvpa/kind", "stream": True, **body}
            lines = http.post("/v1/chat/completions", json=stream).text.splitlines()
            parts = [json.loads(x[6:]) for x in lines if x.startswith("data: {")]
            text = "".join(p["choices"][0]["delta"].get("content", "") for p in parts)
            assert text == best
            assert lines[-2] == "data: [DONE]"


# -- access


def test_keys_open_what_their_scope_says(place: Path) -> None:
    url = f"sqlite:///{place / 'keys.db'}"
    store = Store(url)
    secrets = {
        scope: new_key(store, scope, "ann" if scope == "user" else None)[0]
        for scope in ("chat", "user", "admin")
    }
    with serving(place / "policy", store=url, rate=120) as (server, _):

        def status(scope: str, method: str, path: str, **body: Any) -> int:
            head = {"authorization": f"Bearer {secrets.get(scope, scope)}"}
            return httpx.request(
                method, server + path, headers=head, json=body or None, timeout=30
            ).status_code

        chat = {"model": "fedvpa/kind", **GREEDY}
        assert status("fv-wrong", "POST", "/v1/chat/completions", **chat) == 401
        assert httpx.get(f"{server}/v1/models").status_code == 401
        for scope in secrets:
            assert status(scope, "POST", "/v1/chat/completions", **chat) == 200
        mine = {**chat, "model": "fedvpa/mine"}
        assert status("chat", "POST", "/v1/chat/completions", **mine) == 400
        assert status("chat", "POST", "/v1/chat/completions", **mine, user="ann") == 403
        assert status("user", "POST", "/v1/chat/completions", **mine) == 200
        assert status("user", "POST", "/v1/chat/completions", **mine, user="bob") == 403
        assert status("user", "GET", "/v1/users/ann") == 200
        assert status("user", "GET", "/v1/users/bob") == 403
        assert status("user", "DELETE", "/v1/users/bob") == 403
        assert status("chat", "GET", "/v1/users/ann") == 403
        assert status("admin", "GET", "/v1/users/bob") == 200
        # 120 a minute: twenty at once
        found = [status("chat", "GET", "/v1/models") for _ in range(25)]
        assert 429 in found
        head = {"authorization": f"Bearer {secrets['chat']}"}
        late = httpx.get(f"{server}/v1/models", headers=head)
        assert late.status_code == 429
        assert int(late.headers["retry-after"]) >= 1
        assert status("admin", "GET", "/v1/models") == 200  # others have buckets of their own
        for row in list(store.keys()):
            store.revoke(row.id)
        assert status("admin", "GET", "/v1/models") == 401
    store.close()


def test_neither_texts_nor_keys_are_in_the_log(
    http: httpx.Client, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "fedvpa")
    body = {"model": "fedvpa/kind", **GREEDY, "messages": [{"role": "user", "content": "secretly"}]}
    head = {"authorization": "Bearer fv-unknown"}
    http.post("/v1/chat/completions", json=body, headers=head)
    http.post("/v1/users/zoe/comparisons", json=pairs_of(place, "kind")[0])
    http.post("/v1/chat/completions", json=body | {"temperature": "secretly"})
    lines: list[logging.LogRecord] = []
    for _ in range(100):  # a line is written once the response has gone
        lines = [r for r in caplog.records if r.name == "fedvpa.serving"]
        if len(lines) == 3:
            break
        time.sleep(0.02)
    assert len(lines) == 3
    fields = [r.fields for r in lines]  # type: ignore[attr-defined]
    assert fields[1]["route"] == "/v1/users/{user}/comparisons"
    assert all(f["request"] and f["ms"] >= 0 for f in fields)
    everything = caplog.text + str(fields)
    assert not any(w in everything for w in ("secretly", "fv-unknown", "please help", "zoe"))
    numbers = http.get("/metrics").text
    assert (
        'fedvpa_requests_total{method="POST",route="/v1/chat/completions",status="400"}' in numbers
    )
    assert "fedvpa_posterior_updates_total" in numbers
    assert "fedvpa_first_token_seconds_bucket" in numbers
    assert "fedvpa_running 0.0" in numbers


def test_other_machines_need_keys_and_ports_must_be_free(
    place: Path, server: tuple[str, Served]
) -> None:
    store = f"sqlite:///{place / 'outside.db'}"
    outside = ServingSettings(directory=str(place / "policy"), host="0.0.0.0", port=0, store=store)
    with pytest.raises(BadInputError, match="there are no keys; make one with `fedvpa keys add"):
        check(outside)
    opened = Store(store)
    new_key(opened, "admin")
    opened.close()
    check(outside)
    port = int(server[0].rpartition(":")[2])
    with pytest.raises(BadInputError, match=f"--port {port}: Address already in use"):
        bound(ServingSettings(directory=str(place / "policy"), port=port, store=store))


def test_what_cannot_be_served(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'u.db'}"

    def opening(directory: Path, **more: Any) -> None:
        open_served(ServingSettings(directory=str(directory), store=store, **more))

    with pytest.raises(BadInputError, match="no "):
        opening(tmp_path)
    (tmp_path / "short").write_text("hush")
    with pytest.raises(BadInputError, match="4 bytes; at least 32"):
        opening(place / "policy", secret=str(tmp_path / "short"))
    with pytest.raises(BadInputError, match="no such file"):
        opening(place / "policy", bank=str(tmp_path / "none.jsonl"))
    lonely = make_policy(tmp_path / "policy", tiny_model, place / "run")
    card = json.loads((lonely / "policy.json").read_text())
    assert card["selector"] == str(place / "run")
    text = (lonely / "policy.json").read_text().replace(str(place / "run"), str(tmp_path / "gone"))
    (lonely / "policy.json").write_text(text)
    with pytest.raises(BadInputError, match="gone"):
        opening(lonely)


@pytest.mark.slow
def test_processes_serve_one_database_and_end_when_they_are_told(
    place: Path, tmp_path: Path
) -> None:
    store = f"sqlite:///{tmp_path / 'users.db'}"
    command = [sys.executable, "-m", "fedvpa.cli.main"]
    made = subprocess.run(
        [*command, "keys", "add", "--store", store, "--scope", "admin", "--quiet"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    secret = made.stdout.strip()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = ["serve", str(place / "policy"), "--port", str(port), "--store", store]
    log = (tmp_path / "log").open("w")
    with subprocess.Popen([*command, *given, "--workers", "2"], stderr=log, stdout=log) as process:
        try:
            head = {"authorization": f"Bearer {secret}"}
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                try:
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            # whichever process answers, it knows what the other one was told
            for i, pair in enumerate(pairs_of(place, "kind")[:8]):
                with httpx.Client(base_url=url, headers=head, timeout=30) as http:
                    added = http.post("/v1/users/ann/comparisons", json=pair)
                    assert added.json()["pairs"] == i + 1
            assert httpx.get(f"{url}/v1/models").status_code == 401
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
    log.close()
    text = (tmp_path / "log").read_text()
    assert secret not in text
    assert "please help" not in text
    assert process.returncode in (0, -signal.SIGTERM)
