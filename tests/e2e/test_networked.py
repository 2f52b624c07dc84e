"""The server against clients in this process, behind a transport that can fail: what counts, and
what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedvpa.checkpoint import load_checkpoint
from fedvpa.config import build_config
from fedvpa.data.preferences import to_record
from fedvpa.data.reading import read_pairs
from fedvpa.errors import BadInputError
from fedvpa.experiment.evaluate import EvaluationSettings, evaluate
from fedvpa.experiment.train import train
from fedvpa.experiment.use import PreferenceModel
from fedvpa.federated.exchanges import may_hold
from fedvpa.network.daemon import Client
from fedvpa.network.reach import CohortError
from fedvpa.network.serve import serve
from fedvpa.network.settings import ClientSettings, ServerSettings, read_settings, training_config
from fedvpa.network.wire import Packet, WireError, pack, unpack
from tests.e2e.loop import BAYES, TRAINING, Loop, Make, Tamper


def state_of(path: Path) -> Any:
    return load_checkpoint(path.parent / "run" / "checkpoint.safetensors").state


def result_of(path: Path) -> Any:
    return json.loads((path.parent / "run" / "federation.json").read_text())


def simulated(path: Path, loop: Loop, backend: str = "vectorised") -> Any:
    """The same clients, in the simulator."""
    settings = read_settings(path, ServerSettings)
    lines = []
    for name in settings.clients:
        for pair in read_pairs(str(path.parent / "clients" / name / "pairs.jsonl")).pairs:
            lines.append(json.dumps(to_record(replace(pair, client_id=name))))
    (path.parent / "all.jsonl").write_text("\n".join(lines) + "\n")
    config = training_config(settings)
    source = str(path.parent / "all.jsonl")
    data = {"source": source, "clients": len(settings.clients), "public": config.data.public}
    here = {"data": data}
    given = config.model_dump(exclude={"data", "out"}, exclude_unset=True)
    how = {"out": str(path.parent / "sim"), "federation": {"backend": backend}}
    train(build_config(given, here, how))
    return load_checkpoint(path.parent / "sim" / "checkpoint.safetensors").state


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "number of components found": {"prototypes": {"start_round": 2}},
    "gumbel weights over components": {
        "method": "fedvpl+mix", "prototypes": {"modes": 2}, "prior": {"kind": "components",
        "weights": "gumbel"},
    },
    "orthogonal prototypes with prices": {
        "method": "fedvpl+ortho", "prototypes": {"kind": "learned", "modes": 2, "radius": 2.0},
        "prior": {"kind": "components"},
    },
    "peers": {"method": "fedvpl+mix", "prototypes": {"modes": 2}, "prior": {"kind": "peers",
    "weights": "gumbel"}},
    "peers by size": {
        "method": "fedvpl+mix", "prototypes": {"modes": 2}, "prior": {"kind": "peers",
        "weights": "sample-size"},
        "federation": TRAINING["federation"] | {"aggregation": "samples", "cohort": 3},
    },
    "fedvpa-gp": BAYES,
    "fedvpa-gp, groups given": BAYES | {"population": {"structure": "groups", "order": 2,
    "ridge": 0.01, "width": 1.0}},
    "fedvpa-gp, sampled, of three": BAYES | {"population": {"samples": 2}, "federation":
    BAYES["federation"] | {"cohort": 3}},
    "robust": {"federation": TRAINING["federation"] | {"aggregator": "trimmed-mean",
    "max_norm": 0.05}},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_simulator(name: str, make: Make) -> None:
    path, loop = make(training=VARIANTS[name])
    serve(path, loop)
    # a search amplifies the order in which numbers are added: one client at a time
    backend = "sequential" if "fedvpa-gp" in name else "vectorised"
    there, here = state_of(path), simulated(path, loop, backend)
    for section in ("params", "population", "components"):
        a, b = getattr(there, section), getattr(here, section)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(
                a[key], b[key], atol=1e-6, rtol=1e-5, msg=lambda m, n=key: f"{n}: {m}"
            )


def test_nothing_leaves_but_what_the_manifest_lists(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    path, loop = make()
    caplog.set_level("INFO", "fedvpa")
    serve(path, loop)
    # on both sides: the server, and four clients
    assert sum("what travels" in m for m in caplog.messages) == 5
    manifest = json.loads((path.parent / "run" / "manifest.json").read_text())
    up = sum(
        row["bytes"]
        for row in manifest
        if row["direction"] == "up" and row["when"] == "every round"
    )
    for (_, kind), reply in zip(loop.asked, loop.sent):
        assert all(may_hold(kind, name) for name in reply.tensors)
        assert set(reply.header) <= {"ok", "name", "signature", "width", "round", "whitening"}
        if kind == "train":
            assert sum(v.numel() * v.element_size() for v in reply.tensors.values()) <= up
            # sums are fitted, weights are uniform
            assert not any("posterior" in n or n == "size" for n in reply.tensors)
        # one client's share of each start is one component: its latent goes into a sum
        if kind == "moments":
            assert reply.tensors["weight"].sum(-1).eq(1).all()
        words = json.dumps(reply.header)
        assert "please" not in words
        assert "pairs" not in words
    strange = Client(ClientSettings(name="x", data="p"), path.parent)
    strange._on_settle = lambda packet: Packet({}, {"features": torch.zeros(1)})  # type: ignore[method-assign]
    refused = unpack(strange.answer(pack(Packet({"kind": "settle"}, {}))))
    assert refused.header == {"ok": False, "code": "failed"}
    assert not refused.tensors
    assert "'features' is not part of a reply to 'settle'" in caplog.text


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def spoilt(change: Change, node: int = 101) -> Tamper:

    def tamper(n: int, request: Packet, reply: Packet) -> Packet:
        if n != node or request.header["kind"] != "train":
            return reply
        tensors, header = dict(reply.tensors), dict(reply.header)
        change(tensors, header)
        return Packet(header, tensors)

    return tamper


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda t, h: t.__setitem__(name, value(t[name]))


SPOILT: dict[str, tuple[Change, str]] = {
    "NaN": (put("delta/reward.weight", lambda v: v * torch.nan), "holds NaN or Inf"),
    "Inf": (put("delta/reward.weight", lambda v: v + torch.inf), "holds NaN or Inf"),
    "shape": (put("delta/reward.weight", lambda v: v[:-1]), "has shape (5,), not (6,)"),
    "type": (
        put("delta/reward.weight", lambda v: v.double()),
        "is torch.float64, not torch.float32",
    ),
    "huge": (put("delta/reward.weight", lambda v: v + 1e9), "holds values beyond"),
    "missing": (
        lambda t, h: t.__delitem__("delta/reward.weight"),
        "'delta/reward.weight' is missing",
    ),
    "more": (
        lambda t, h: t.__setitem__("delta/extra", torch.zeros(1)),
        "'delta/extra' is unexpected",
    ),
    "an old round": (lambda t, h: h.__setitem__("round", h["round"] - 1), "but this is round"),
    "loss": (put("loss/loss", lambda v: v * torch.nan), "holds NaN or Inf"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_replies_are_refused_with_the_client_named(
    name: str, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    change, reason = SPOILT[name]
    path, loop = make(min_replies=3)
    loop.tamper = spoilt(change)
    serve(path, loop)
    assert any("'client-1'" in m and reason in m for m in caplog.messages), caplog.messages
    assert torch.isfinite(state_of(path).params["reward.weight"]).all()


def test_a_client_that_lies_about_its_pairs_does_not_outweigh_the_others(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    path, loop = make(training={"federation": TRAINING["federation"] | {"aggregation": "samples"}})
    loop.tamper = spoilt(put("size", lambda v: v * 1e4))
    serve(path, loop)
    assert any(
        "client 'client-1' says it holds" in m and "it counts as 55" in m for m in caplog.messages
    )
    loop.tamper = spoilt(put("size", lambda v: v * 0))
    (path.parent / "run").rename(path.parent / "first")
    serve(path, loop)
    assert any("says it holds 0 pairs" in m for m in caplog.messages)
    assert result_of(path)["left_out"] == ["client-1"]


def test_a_spoilt_round_without_enough_replies_changes_nothing_and_can_be_resumed(
    make: Make,
) -> None:
    path, loop = make()
    loop.tamper = lambda node, request, reply: (
        "no reply within 1 s" if node == 101 and request.header["kind"] == "train" else reply
    )
    with pytest.raises(
        CohortError, match="3 usable replies after 2 attempts, 4 are needed; missing: client-1"
    ):
        serve(path, loop)
    assert json.loads((path.parent / "run" / "status.json").read_text())["state"] == "failed"
    loop.tamper = lambda node, request, reply: reply
    serve(path, loop)
    whole, (other, again) = state_of(path), make()
    assert whole.round == 3
    (path.parent / "run").rename(path.parent / "first")
    for name in ("client-0", "client-1", "client-2", "client-3"):
        for folder in (path.parent / "clients" / name / "state").iterdir():
            folder.rename(folder.with_name(folder.name + "-old"))
    serve(other, again)
    for key, value in state_of(other).params.items():
        torch.testing.assert_close(value, whole.params[key], atol=1e-6, rtol=0)


def test_a_reply_that_is_lost_once_is_asked_for_again_and_counts_once(make: Make) -> None:
    path, loop = make()
    lost = [0]

    def lose(node: int, request: Packet, reply: Packet) -> Packet | str:
        if (
            node == 102
            and request.header["kind"] == "train"
            and request.header["round"] == 1
            and not lost[0]
        ):
            lost[0] += 1
            return "no reply within 1 s"
        return reply

    loop.tamper = lose
    serve(path, loop)
    assert lost[0] == 1
    there, here = state_of(path), simulated(path, loop)
    for key, value in there.params.items():
        torch.testing.assert_close(value, here.params[key], atol=1e-6, rtol=1e-5)


def test_a_restarted_client_goes_on_from_its_own_state(make: Make) -> None:
    training = VARIANTS["gumbel weights over components"]
    path, loop = make(training=training)

    def restart(node: int, request: Packet, reply: Packet) -> Packet:
        # killed after its answer, with nothing left in memory
        if node == 101 and request.header["kind"] == "train":
            old = loop.clients[101]
            loop.clients[101] = Client(old.settings, path.parent / "clients" / "client-1")
        return reply

    loop.tamper = restart
    serve(path, loop)
    there, here = state_of(path), simulated(path, loop)
    for key, value in there.params.items():
        torch.testing.assert_close(value, here.params[key], atol=1e-6, rtol=1e-5)


def test_a_full_disk_on_a_client_loses_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fedvpa.network import daemon as module

    path, loop = make()
    full, write = [0], module.write_atomically

    def fail_once(target: Path, content: bytes, **mode: bool) -> None:
        if "client-2" in str(target) and target.name == "private.safetensors" and full[0] < 1:
            full[0] += 1
            raise OSError(28, "No space left on device")
        write(target, content, **mode)

    monkeypatch.setattr(module, "write_atomically", fail_once)
    serve(path, loop)
    assert full[0] == 1
    assert any("No space left on device" in m for m in caplog.messages)  # the client's own log
    assert any("could not save its state [disk]" in m for m in caplog.messages)
    there, here = state_of(path), simulated(path, loop)
    for key, value in there.params.items():
        torch.testing.assert_close(value, here.params[key], atol=1e-6, rtol=1e-5)


def test_replayed_requests_and_unknown_ones_are_refused_by_the_client(make: Make) -> None:
    path, loop = make()
    requests = []

    def keep(node: int, request: Packet, reply: Packet) -> Packet:
        if node == 100 and request.header["kind"] == "train":
            requests.append(request)
        return reply

    loop.tamper = keep
    serve(path, loop)
    old = unpack(loop.clients[100].answer(pack(requests[0])))
    assert old.header["code"] == "replayed"
    assert not old.tensors
    for blob, code in (
        (pack(Packet({"kind": "dump"}, {})), "unknown-request"),
        (bytes(30), "unread"),
    ):
        assert unpack(loop.clients[100].answer(blob)).header == {"ok": False, "code": code}


def test_who_is_not_a_client_is_refused(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    path, loop = make()
    twin, home = loop.clients[100].settings, path.parent / "clients" / "client-0"
    loop.clients[200] = Client(twin, home)
    loop.clients[201] = Client(twin.model_copy(update={"name": "stranger"}), home)
    serve(path, loop)
    assert any("a client of that name is connected already" in m for m in caplog.messages)
    assert any("the server knows no client 'stranger'" in m for m in caplog.messages)
    assert {n for n, kind in loop.asked if kind == "train"} == {100, 101, 102, 103}


def test_secure_sums_give_the_same_and_the_server_sees_no_single_reply(make: Make) -> None:
    path, loop = make(secure=True)
    serve(path, loop)
    there, here = state_of(path), simulated(path, loop)
    for key, value in there.params.items():
        torch.testing.assert_close(value, here.params[key], atol=2e-4, rtol=2e-3)
    assert all(not reply.tensors for reply in loop.sent)  # in the clear: greetings and thanks alone


@pytest.mark.parametrize("secure", [False, True])
def test_the_mixture_prior_is_found_from_sums_alone(
    secure: bool, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    path, loop = make(6, training=BAYES, secure=secure)
    caplog.set_level("INFO", "fedvpa")
    serve(path, loop)
    there, here = state_of(path), simulated(path, loop)
    for key, value in there.params.items():
        torch.testing.assert_close(value, here.params[key], atol=2e-4, rtol=2e-3)
    assert {kind for _, kind in loop.asked} >= {"outline", "slopes", "clusters", "judge", "settle"}
    manifest = json.loads((path.parent / "run" / "manifest.json").read_text())
    up = [row for row in manifest if row["direction"] == "up" and "gradient" in row["name"]]
    most = max(sum(r["bytes"] for r in up if r["when"] == when) for when in {r["when"] for r in up})
    for (_, kind), reply in zip(loop.asked, loop.sent):
        assert all(may_hold(kind, name) for name in reply.tensors)
        if kind == "slopes" and not secure:
            gradients = (reply.tensors["weight"], reply.tensors["bilinear"])
            assert sum(4 * v.numel() for v in gradients) <= most
    if secure:  # in the clear: greetings and thanks alone
        assert all(not reply.tensors for reply in loop.sent)
    # each client notes for itself where it belongs, and has no such requests as another method's
    saved = list((path.parent / "clients" / "client-0" / "state").rglob("settled.safetensors"))
    assert len(saved) == 1
    asked = pack(Packet({"kind": "train", "round": 9}, {}))
    assert unpack(loop.clients[100].answer(asked)).header["code"] == "unknown-request"
    other, elsewhere = make(6)
    (path.parent / "run").rename(path.parent / "first")
    for name in read_settings(other, ServerSettings).clients:
        (path.parent / "clients" / name / "state").rename(path.parent / f"state-{name}")
    serve(other, elsewhere)
    asked = pack(Packet({"kind": "outline"}, {"fold": torch.tensor([-1])}))
    assert unpack(elsewhere.clients[100].answer(asked)).header["code"] == "unknown-request"


def test_a_search_that_stops_goes_on_where_it_was(make: Make) -> None:
    path, loop = make(training=BAYES)
    fail = {"slopes": 2, "judge": 1}
    asked: dict[str, int] = {}

    def lose(node: int, request: Packet, reply: Packet) -> Packet | str:
        kind = request.header["kind"]
        if node == 101 and kind in fail:
            asked[kind] = asked.get(kind, 0) + 1
            # both attempts
            if asked[kind] in (fail[kind], fail[kind] + 1):
                return "no reply within 1 s"
        return reply

    loop.tamper = lose
    stops = 0
    for _ in range(5):
        try:
            serve(path, loop)
            break
        except CohortError:
            stops += 1
    assert stops == 2
    there, here = state_of(path), simulated(path, loop)
    for key, value in there.params.items():
        torch.testing.assert_close(value, here.params[key], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_federation_of_private_clients_sends_no_loss(make: Make, pair_file: Path) -> None:
    private = {
        "data": {"public": str(pair_file / "kind" / "test.jsonl")},
        "privacy": {"enabled": True, "noise": 0.5, "fit_noise": 0.5},
        "federation": TRAINING["federation"] | {"cohort": 3},
    }  # fmt: skip
    path, loop = make(training=private, min_replies=1)
    serve(path, loop)
    kinds = {kind for _, kind in loop.asked}
    assert "whitening" not in kinds
    assert "validate" not in kinds
    assert not any("loss" in name for reply in loop.sent for name in reply.tensors)
    history = load_checkpoint(path.parent / "run" / "checkpoint.safetensors").history
    assert [row["epsilon"] for row in history] == sorted(row["epsilon"] for row in history)


@pytest.mark.parametrize("lied", [False, True])
def test_private_clients_of_the_bayes_method_answer_within_bounds(
    lied: bool, make: Make, pair_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("dp_accounting")
    quiet = {
        "data": {"public": str(pair_file / "kind" / "test.jsonl")},
        "population": {"order": 2},
        # without noise, to compare with the simulator
        "privacy": {"enabled": True, "noise": 0.0, "fit_noise": 0.0, "clip": 0.2},
        "federation": BAYES["federation"] | {"rounds": 3},
    }  # fmt: skip
    path, loop = make(training=BAYES | quiet, min_replies=3)
    bad = 101

    def tamper(node: int, request: Packet, reply: Packet) -> Packet:
        kind, number = request.header["kind"], request.header.get("round")
        if not lied or (node, kind, number) != (bad, "bounded", 1):
            return reply
        tensors = {name: 10 * value for name, value in reply.tensors.items()}
        return Packet(reply.header, tensors)

    loop.tamper = tamper
    serve(path, loop)
    about_pairs = {kind for _, kind in loop.asked} - {"hello", "prepare", "settle"}
    assert about_pairs == {"bounded", "gains"}
    assert ("a contribution of norm" in caplog.text) == lied
    if lied:
        return
    there, here = state_of(path), simulated(path, loop)
    for section in ("params", "components"):
        for name, value in getattr(there, section).items():
            torch.testing.assert_close(value, getattr(here, section)[name], atol=1e-6, rtol=1e-5)


def test_the_run_serves_a_user_like_any_other(make: Make, pair_file: Path) -> None:
    longer = {
        "prototypes": {"start_round": 6, "modes": 2},
        "federation": {"rounds": 8, "local_steps": 30, "learning_rate": 0.02},
    }
    path, loop = make(training=longer)
    serve(path, loop)
    model = PreferenceModel(path.parent / "run")
    kind = model.personalize(read_pairs(str(pair_file / "kind" / "test.jsonl")).pairs[:8])
    blunt = model.personalize(read_pairs(str(pair_file / "blunt" / "test.jsonl")).pairs[:8])
    assert kind.nearest != blunt.nearest
    settings = EvaluationSettings(str(pair_file), "test", clients=4, context=4)
    results = evaluate(str(path.parent / "run"), settings).results
    assert results["accuracy"]["own"]["mean"] > 0.9
    assert results["seen"] is None
    assert results["data"]["dropped_because_trained_on"] is None
    with pytest.raises(BadInputError, match="are its clients'"):
        evaluate(str(path.parent / "run"), EvaluationSettings())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"method": "fedavg-btl"}}, "does not run as a federation"),
        ({"training": {"data": {"source": "x"}}}, "the data are the clients'"),
        ({"clients": ["a", "a"]}, "'a' is named twice"),
        ({"min_replies": 9}, "min_replies: 9, but there are 4 clients"),
        (
            {"secure": True, "training": {"method": "fedvpl+mix", "prior": {"kind": "peers"}}},
            "secure: only sums over clients are known",
        ),
        ({"rounds": 3}, "rounds: unknown setting"),
        (
            {
                "secure": True,
                "training": {"method": "fedvpl", "federation": {"aggregator": "median"}},
            },
            "secure: only sums",
        ),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str, make: Make) -> None:
    path, loop = make()
    given = yaml.safe_load(path.read_text()) | change
    path.write_text(yaml.safe_dump(given))
    with pytest.raises(BadInputError, match=message):
        serve(path, loop)
    assert not (path.parent / "run" / "config.yaml").exists()


def test_settings_of_an_older_project_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fedvpa")
    old = {"name": "a", "data": "pairs.jsonl", "key": "node.key", "root_certificate": "ca.crt"}
    old |= {"certificate": "node.crt", "certificate_key": "node-tls.key", "runtime_port": 9093}
    (tmp_path / "client.yaml").write_text(yaml.safe_dump(old))
    found = read_settings(tmp_path / "client.yaml", ClientSettings)
    assert (found.key, found.backbone, found.pairs) == ("node.key", "smollm2", "fixed")
    assert [m for m in caplog.messages if "is not read any longer; remove it" in m] != []
    (tmp_path / "client.yaml").write_text(yaml.safe_dump(old | {"runtime": 1}))
    with pytest.raises(BadInputError, match="runtime: unknown setting"):
        read_settings(tmp_path / "client.yaml", ClientSettings)


def test_latents_are_summed_unless_asked_for_otherwise() -> None:
    for training in ({"preset": "paper"}, {"method": "fedvpl"}, {"method": "fedvpl+mix"}):
        found = training_config(ServerSettings(clients=("a", "b"), training=training))
        assert found.prior.kind == "components", training


def test_broken_blobs_are_one_kind_of_error() -> None:
    good = pack(Packet({"kind": "x"}, {"a": torch.ones(2)}))
    assert torch.equal(unpack(good).tensors["a"], torch.ones(2))
    for blob in (b"", good[:-1], good[:20], b"\xff" * 64, good.replace(b"fedvpa", b"fedvpx")):
        with pytest.raises(WireError, match="not a fedvpa message"):
            unpack(blob)
