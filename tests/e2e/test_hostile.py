"""One bad client, and a greedy server: what they send, and what it does. In this process; the same
over the network is in `test_attacks.py`."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedvpa.data.reading import read_pairs
from fedvpa.errors import RunError
from fedvpa.features.cache import FeatureCache
from fedvpa.features.whitening import Whitener
from fedvpa.federated.exchanges import EXCHANGES
from fedvpa.network.codes import REASONS, RefusedError
from fedvpa.network.daemon import Client
from fedvpa.network.serve import CONDUCT, serve
from fedvpa.network.settings import ClientSettings, ServerSettings, read_settings, training_config
from fedvpa.network.wire import Packet, WireError, pack, unpack
from tests.e2e.loop import ASKED_BY_BAYES, BAYES, TRAINING, Loop, Make, Tamper

BAD = 101
"""The node of client-1, which is the bad one."""


def run(path: Path, loop: Loop) -> dict[str, Any]:
    """The federation, with the clients' names bound to their keys."""
    return serve(path, loop, {c.settings.name: node for node, c in loop.clients.items()})


def deep() -> bytes:
    """A table of contents that is nested beyond what a parser follows."""
    table = b"[" * 100_000 + b"]" * 100_000
    return struct.pack("<Q", len(table)) + table


def endless_shape() -> bytes:
    """A tensor without an element, of a shape that overflows."""
    entry = {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}
    table = json.dumps({"__metadata__": {"fedvpa": '{"ok": true}'}, "x": entry}).encode()
    return struct.pack("<Q", len(table)) + table


def header(**words: Any) -> bytes:
    """A reply without tensors."""
    return pack(Packet({"ok": True, **words}, {}))


BLOBS = {
    "nothing": b"", "noise": random.Random(0).randbytes(5000), "deep JSON": deep(),
    "an endless shape": endless_shape(), "no tensors": header(round=0),
    "a header that is a list": pack(Packet([1], {})),  # type: ignore[arg-type]
    "a code that nobody knows": pack(Packet({"ok": False, "code": "x\n12:00:00 finished"}, {})),
    "an error in its own words": pack(Packet({"ok": False, "error": "\x1b[2Jfinished"}, {})),
}  # fmt: skip


def answering(kind: str, change: Callable[[Packet], Packet | bytes]) -> Tamper:
    """The bad client's answers to one request are changed."""
    return lambda node, request, reply: (
        change(reply) if node == BAD and request.header["kind"] == kind else reply
    )


def with_tensors(**values: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Packet], Packet]:
    """A reply with some of its tensors changed."""
    return lambda reply: Packet(
        reply.header, {n: values[n](v) if n in values else v for n, v in reply.tensors.items()}
    )


@pytest.mark.parametrize("kind", ["hello", "train", "moments"])
@pytest.mark.parametrize("name", BLOBS)
def test_whatever_a_client_sends_is_refused_and_the_round_goes_on(
    name: str, kind: str, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Two such replies, and the client is left out."""
    path, loop = make(min_clients=3)
    loop.tamper = answering(kind, lambda reply: BLOBS[name])
    result = run(path, loop)
    assert result["rounds"] == 3
    assert any("'client-1'" in message for message in caplog.messages)
    lines = (path.parent / "run").joinpath("history.json").read_text()
    assert "NaN" not in lines
    said = [r.getMessage() for r in caplog.records if r.name == "fedvpa"]
    assert not any("\x1b" in m or "\n" in m for m in said)
    if (kind, name) == ("hello", "no tensors"):  # an honest client may be misnamed
        return
    caught = json.loads((path.parent / "run" / CONDUCT).read_text())["client-1"]
    # whoever spoils a greeting is not greeted again for half a minute
    assert len(caught) == (1 if kind == "hello" else 2)
    assert result["left_out"] == ([] if kind == "hello" else ["client-1"])


def test_who_was_left_out_stays_out_when_the_server_is_started_again(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    path, loop = make(min_clients=3)
    loop.tamper = answering("train", lambda reply: deep())
    run(path, loop)
    given = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(given | {"run": "second"}))
    (path.parent / "second").mkdir()
    (path.parent / "second" / CONDUCT).write_text((path.parent / "run" / CONDUCT).read_text())
    loop.asked.clear()
    loop.tamper = lambda node, request, reply: reply
    run(path, loop)
    assert BAD not in {node for node, _ in loop.asked}
    (path.parent / "run" / CONDUCT).write_text("{")
    path.write_text(yaml.safe_dump(given))
    with pytest.raises(RunError, match=r"conduct.json: damaged"):
        run(path, loop)


def of_latent(reply: Packet, size: float) -> Packet:
    """Moments of a latent of this size, which are right in themselves."""
    share = reply.tensors["weight"].unsqueeze(-1).expand_as(reply.tensors["total"])
    return Packet(
        reply.header, {**reply.tensors, "total": share * size, "squared": share * size**2}
    )


IMPLAUSIBLE: dict[str, tuple[str, Callable[[Packet], Packet], str]] = {
    "a whitening that drowns the others'": (
        "whitening", with_tensors(moment=lambda m: 1e11 * torch.eye(len(m), dtype=m.dtype)),
        "second moment per pair"),
    "features that drown the others'": (
        "whitening", with_tensors(total=lambda t: t * 1e6), "feature per pair"),
    "a second moment that is none": (
        "whitening", with_tensors(moment=lambda m: -m), "not one that a client could have"),
    "a latent that draws components together": (
        "moments", lambda reply: of_latent(reply, 900.0), "latent"),
    "a square that is not the latent's": (
        "moments", with_tensors(squared=lambda s: s * 2 + 1), "not one that a client could have"),
    "two components": (
        "moments", with_tensors(weight=torch.ones_like), "not one that a client could have"),
    "variances without end": (
        "moments", with_tensors(variance=lambda v: v * 1e6), "variance of the latent"),
    "accuracy below nought": (
        "validate", with_tensors(accuracy=lambda a: a * 0 - 2.5e10),
        "not one that a client could have"),
    "accuracy above one": (
        "validate", with_tensors(accuracy=lambda a: a * 0 + 1.5),
        "not one that a client could have"),
    "a negative loss": (
        "validate", with_tensors(nll=lambda n: -n - 1), "not one that a client could have"),
    "two clients in one": (
        "slopes", with_tensors(share=lambda s: 2 * s + 1), "not one that a client could have"),
    "a gradient that drowns the others'": (
        "slopes", with_tensors(weight=lambda w: 1e4 * (w + 0.1)), "gradient per target"),
    "targets below nought": (
        "slopes", with_tensors(targets=lambda t: -t - 1), "not one that a client could have"),
    "a covariance that is none": (
        "outline", with_tensors(cross=lambda c: c + torch.ones_like(c).triu()),
        "not one that a client could have"),
    "a choice that is more than certain": (
        "judge", with_tensors(total=lambda t: -t + 1), "not one that a client could have"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPLAUSIBLE)
def test_numbers_that_no_client_could_have_do_not_count(
    name: str, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    kind, change, reason = IMPLAUSIBLE[name]
    bayes = BAYES if kind in ASKED_BY_BAYES else None
    path, loop = make(training=bayes, min_clients=3)
    loop.tamper = answering(kind, change)
    result = run(path, loop)
    assert result["left_out"] == ["client-1"]
    assert any("'client-1'" in m and reason in m for m in caplog.messages), caplog.messages


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_structured_noise_at_the_door_is_one_kind_of_error(data: st.DataObject) -> None:
    """Blobs that are almost right: a parser of them raises `WireError`, or they are read."""
    numbers = st.integers(-(2**70), 2**70) | st.floats() | st.text() | st.none()
    value = st.recursive(numbers, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(), v))
    shape = st.lists(st.integers(-1, 2**63), max_size=9) | value
    entry = st.fixed_dictionaries(
        {"dtype": st.sampled_from(["F32", "F64", "I64", "BOOL", "X"]) | value, "shape": shape,
         "data_offsets": st.lists(st.integers(0, 2**40), min_size=2, max_size=2) | value}
    )  # fmt: skip
    told = st.dictionaries(st.sampled_from(["ok", "code", "round", "name"]), value).map(json.dumps)
    table = {"__metadata__": data.draw(st.fixed_dictionaries({"fedvpa": told | st.text()}) | value)}
    table |= data.draw(st.dictionaries(st.text(max_size=9), entry | value, max_size=3))
    text = json.dumps(table).encode()
    length = data.draw(st.sampled_from([len(text), len(text) + 1, 2**63, 0]))
    blob = struct.pack("<Q", length) + text + data.draw(st.binary(max_size=64))
    try:
        found = unpack(blob)
    except WireError as error:
        assert len(str(error)) < 100
    else:
        assert isinstance(found.header, dict)


@pytest.mark.parametrize("kind", sorted(EXCHANGES))
def test_answers_of_another_shape_to_every_request_are_refused(kind: str, make: Make) -> None:
    """Every tensor of every reply, in turn: another shape, another type, NaN, missing."""
    bayes = BAYES if kind in ASKED_BY_BAYES else None
    path, loop = make(training=bayes, min_clients=3, min_replies=3)
    chance = random.Random(kind)

    def spoil(node: int, request: Packet, reply: Packet) -> Packet:
        if node != BAD or request.header["kind"] != kind or not reply.tensors:
            return reply
        tensors = dict(reply.tensors)
        name = chance.choice(sorted(tensors))
        change = chance.choice([
            lambda v: v.unsqueeze(0), lambda v: v.bool(), lambda v: v * torch.nan,
            lambda v: v.flatten()[:0], lambda v: v + 1e300,
        ])  # fmt: skip
        tensors[name] = change(tensors[name])
        return Packet({**reply.header, "round": chance.choice([None, [], {}, "x"])}, tensors)

    loop.tamper = spoil
    result = run(path, loop)
    assert result["rounds"] == (3 if bayes is None else 5)
    state = json.loads((path.parent / "run" / "history.json").read_text())
    assert all(row["loss"] is not None for row in state)


def test_the_first_greeting_does_not_decide(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A client that invents features is refused, and the honest ones are not, whoever is first."""
    path, loop = make(min_clients=3)
    loop.clients = {BAD: loop.clients[BAD], **loop.clients}
    loop.tamper = answering(
        "hello",
        lambda reply: Packet({**reply.header, "signature": "made up\n" * 50, "width": 7}, {}),
    )
    run(path, loop)
    refused = [m for m in caplog.messages if "is refused" in m]
    assert refused
    assert all("'client-1'" in m and "another backbone" in m for m in refused)
    assert {n for n, kind in loop.asked if kind == "train"} == {100, 102, 103}


def greeting(path: Path, loop: Loop, **change: Any) -> Packet:
    """What the server says to a new client."""
    settings = read_settings(path, ServerSettings)
    config = training_config(settings).model_dump(mode="json")
    for name, value in change.items():
        section, _, key = name.partition("__")
        config[section] = {**config[section], key: value} if key else value
    told = {"kind": "hello", "run": "r", "config": config, "clients": list(settings.clients)}
    return Packet(told | {"columns": 0}, {})


def greeted(make: Make) -> Client:
    """A client that answers in secure sums alone, after a run and a greeting."""
    path, loop = make(secure=True)
    run(path, loop)
    client = loop.clients[100]
    client.settings = client.settings.model_copy(update={"secure_only": True})
    client.answer(pack(greeting(path, loop)))
    return client


SECRET = "my daughter's illness"


@pytest.mark.parametrize(
    "error",
    [
        RunError(f"gave NaN or Inf for response {SECRET!r}"), OSError(13, "denied", SECRET),
        KeyError(SECRET), RecursionError(SECRET), ValueError(SECRET), RefusedError(SECRET, SECRET),
    ],
)  # fmt: skip
def test_no_word_of_an_error_reaches_the_server(
    error: Exception, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, loop = make()

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(FeatureCache, "pairs", fail)
    blob = loop.clients[100].answer(pack(greeting(path, loop)))
    assert SECRET.encode() not in blob
    assert "illness" not in blob.decode("latin-1")
    reply = unpack(blob)
    assert set(reply.header) == {"ok", "code"}
    assert reply.header["code"] in REASONS


def test_files_and_columns_of_a_client_are_not_told(make: Make) -> None:
    path, loop = make()
    home = path.parent / "clients" / "client-0"
    codes = set()
    for data in ("nothing-there.jsonl", "pairs.jsonl"):
        (home / "pairs.jsonl").write_text('{"secret_column": 1}\n')
        client = Client(ClientSettings(name="client-0", data=data), home)
        codes.add(client.answer(pack(greeting(path, loop))))
    assert codes == {pack(Packet({"ok": False, "code": "data"}, {}))}


def test_the_server_does_not_choose_what_a_client_loads_and_runs(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, loop = make()
    client = loop.clients[100]
    elsewhere = pack(greeting(path, loop, features__backbone="/etc", features__device="meta"))
    assert unpack(client.answer(elsewhere)).header["ok"] is True
    assert client._known().features.backbone == client.settings.backbone
    assert client._known().features.device == "cpu"
    monkeypatch.syspath_prepend(str(tmp_path))
    mark = tmp_path / "was-run"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w').write('x')\nPART = None\n")
    for change in ({"prior__kind": "evil:PART"}, {"model__conditioning": "evil:PART"}):
        reply = unpack(client.answer(pack(greeting(path, loop, **change))))
        assert reply.header == {"ok": False, "code": "parts"}
    assert not mark.exists()
    assert "name it under parts in client.yaml" in caplog.text


def test_a_client_that_answers_in_secure_sums_alone_says_nothing_in_the_clear(make: Make) -> None:
    """Whatever a request says of itself: what is masked is decided by the way it came."""
    client = greeted(make)
    for kind, exchange in EXCHANGES.items():
        if exchange.tells_nothing:
            continue
        for more in ({}, {"secure": True}, {"secure": 1, "round": 0, "withhold": False}):
            reply = unpack(client.answer(pack(Packet({"kind": kind, **more}, {}))))
            assert reply.header == {"ok": False, "code": "secure-only"}
            assert not reply.tensors


def test_a_masked_answer_is_no_oracle(make: Make) -> None:
    """A server that scales the features, to learn from refusals in the clear how large they are."""
    client = greeted(make)
    lengths = set()
    for size in (1e-30, 1.0, 1e30, 0.0, torch.nan):
        scale = torch.full((2, 32), size, dtype=torch.float64)
        _, numbers = client.numbers(pack(Packet({"kind": "whitening"}, {"scale": scale})))
        lengths.add(len(numbers))
        assert all(abs(x) <= 1 for (x,) in struct.iter_unpack("<f", numbers))
    assert len(lengths) == 1


def test_the_subject_of_numbers_is_not_the_server_s_to_choose(make: Make) -> None:
    client = greeted(make)
    scale = torch.ones(2, 32, dtype=torch.float64)
    asked = [
        Packet({"kind": "whitening"}, {"scale": scale}),
        Packet({"kind": "whitening", "nonce": 7, "secure": 1}, {"scale": scale}),
        Packet({"kind": "whitening"}, {"scale": scale, "another": torch.ones(3)}),
    ]
    assert len({client.numbers(pack(packet))[0] for packet in asked}) == 1
    for number in (True, 1.5, "1", None):
        with pytest.raises(RefusedError):
            client.numbers(pack(Packet({"kind": "train", "round": number}, {})))


@pytest.mark.parametrize(
    "change",
    [{"seed": 5}, {"data__validation_share": 0.9}, {"features__layer": 1},
     {"features__max_response_tokens": 2}],
)  # fmt: skip
def test_sums_over_other_parts_of_the_same_pairs_are_refused(change: Any, make: Make) -> None:
    """Also in another run: sums over subsets tell single pairs, and those of short texts words."""
    path, loop = make()
    run(path, loop)
    told = greeting(path, loop, **change)
    told.header["run"] = "another"
    client = Client(loop.clients[100].settings, path.parent / "clients" / "client-0")
    assert unpack(client.answer(pack(told))).header == {"ok": False, "code": "other-pairs"}
    willing = client.settings.model_copy(update={"pairs": "may-change"})
    client = Client(willing, path.parent / "clients" / "client-0")
    assert unpack(client.answer(pack(told))).header["ok"] is True


def test_a_client_that_is_silent_costs_one_greeting_at_a_time(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, loop = make(min_clients=3)
    loop.tamper = lambda node, request, reply: (
        "no reply" if node == BAD and request.header["kind"] == "prepare" else reply
    )
    run(path, loop)
    assert loop.asked.count((BAD, "prepare")) == 1
    assert loop.asked.count((BAD, "hello")) == 1


def test_an_honest_client_is_not_struck_out_by_a_small_lie(make: Make) -> None:
    """Half of the clients say that features are tiny: who is right is not known."""
    path, loop = make(count=2, min_clients=2)
    loop.tamper = answering(
        "whitening", with_tensors(moment=lambda m: m * 1e-9, total=lambda t: t * 1e-9)
    )
    assert run(path, loop)["left_out"] == []


def test_a_client_with_other_pairs_does_not_join_an_old_run_unnoticed(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    path, loop = make()
    run(path, loop)
    home = path.parent / "clients" / "client-0"
    lines = (home / "pairs.jsonl").read_text().splitlines()
    swapped = json.loads(lines[0])
    swapped["chosen"], swapped["rejected"] = swapped["rejected"], swapped["chosen"]
    (home / "pairs.jsonl").write_text("\n".join([json.dumps(swapped), *lines[1:]]) + "\n")
    told = greeting(path, loop)
    told.header["run"] = json.loads((path.parent / "run" / "identity.json").read_text())["run"]
    again = Client(loop.clients[100].settings, home)
    assert unpack(again.answer(pack(told))).header == {"ok": False, "code": "other-pairs"}
    assert "holds other pairs than when 'client-0' joined this run" in caplog.text
    willing = again.settings.model_copy(update={"pairs": "may-change"})
    assert unpack(Client(willing, home).answer(pack(told))).header["ok"] is True
    assert len(read_pairs(str(home / "pairs.jsonl")).pairs) == len(lines)


def test_a_whitening_that_hides_the_features_is_seen_in_the_loss(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should a whitening be spoilt all the same: rounds that learn nothing are said, once."""
    path, loop = make(training={"federation": TRAINING["federation"] | {"rounds": 8}})
    nothing = Whitener(torch.zeros(32), torch.full((32, 6), 1e-9))
    monkeypatch.setattr(Whitener, "from_sums", lambda sums, dimensions, white=True: nothing)
    run(path, loop)
    said = [m for m in caplog.messages if "have learnt nothing" in m]
    assert len(said) == 1
    assert "the loss is that of a coin" in said[0]
