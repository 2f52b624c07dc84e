"""Secure sums: exact up to rounding, survive dropouts, and show the server nothing but masked
vectors and the sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common import bytes_to_ndarray, ndarray_to_bytes
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.supercore.task_identity import TaskIdentity

from fedvpa.federated.exchanges import field_of
from fedvpa.network import masks
from fedvpa.network.masked import SecureSums
from fedvpa.network.secure import LEVELS, MODULUS, SecureSumError, Summed, secure_sum
from fedvpa.network.wire import flatten, unflatten

SIZE = 40


class Nodes:
    """Clients with a vector each, behind the app that a node runs; some do not answer from a
    stage on."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        folder: Path,
        count: int,
        gone: Mapping[int, str] = {},
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.vectors = {
            100 + i: (torch.rand(SIZE, generator=generator) * 2 - 1).numpy() for i in range(count)
        }
        self.clients = {
            n: SecureSums(partial(self.answer, n), folder / f"{n}.txt", 3) for n in self.vectors
        }
        self.gone, self.seen, self.errors, self.subject = gone, [], list[str](), "round 0"
        self.tamper_each: Callable[[str, int, ConfigRecord], None] = lambda stage, node, r: None
        self.lie: Callable[[str, int, ConfigRecord], None] = lambda stage, node, record: None
        self.tamper: Callable[[str, ConfigRecord], None] = lambda stage, record: None
        for name in ("_run_id", "_task_id", "_node_id"):
            monkeypatch.setattr(TaskIdentity, name, 1, raising=False)

    def answer(self, node: int, blob: bytes) -> tuple[str, bytes]:
        return self.subject, self.vectors[node].tobytes()

    def exchange(self, contents: Mapping[int, RecordDict]) -> dict[int, RecordDict | str]:
        out: dict[int, RecordDict | str] = {}
        order = [Stage.SETUP, Stage.SHARE_KEYS, Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK]
        for node, content in contents.items():
            record = content.config_records[RECORD_KEY_CONFIGS]
            stage = str(record[Key.STAGE])
            if node in self.gone and order.index(stage) >= order.index(self.gone[node]):
                out[node] = "no reply"
                continue
            self.tamper(stage, record)
            self.tamper_each(stage, node, record)
            message = Message(content, dst_node_id=node, message_type="train")
            message.metadata.__dict__["_message_id"] = "m"
            try:
                reply = self.clients[node].reply(message)
            except Exception as error:
                self.errors.append(str(error))
                out[node] = str(error)
                continue
            self.seen.append(reply.content)
            self.lie(stage, node, reply.content.config_records[RECORD_KEY_CONFIGS])
            out[node] = reply.content
        return out

    def sum(self, least: int = 0) -> Summed:
        requests = {n: RecordDict({"fedvpa": ConfigRecord({"blob": b"x"})}) for n in self.vectors}
        return secure_sum(requests, SIZE, self.exchange, least)


@pytest.mark.parametrize("count", [3, 7])
def test_the_sum_is_right_and_only_masked_vectors_are_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int
) -> None:
    nodes = Nodes(monkeypatch, tmp_path, count)
    active, total, _ = nodes.sum()
    assert sorted(active) == sorted(nodes.vectors)
    expected = np.sum(list(nodes.vectors.values()), axis=0)
    np.testing.assert_allclose(total.numpy(), expected, atol=count * 2 / LEVELS)
    masked = [
        np.concatenate(
            [
                bytes_to_ndarray(b).reshape(-1)
                for b in c.config_records[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS]
            ]
        )
        for c in nodes.seen
        if Key.MASKED_PARAMETERS in c.config_records[RECORD_KEY_CONFIGS]
    ]
    assert len(masked) == count
    plain = [np.round((v + 1) * LEVELS / 2) for v in nodes.vectors.values()]
    for vector in masked:  # uniform over the modulus, and nobody's own numbers
        assert abs(vector.mean() / MODULUS - 0.5) < 0.25
        assert all(np.abs(vector[1:] - p).min() > 2 for p in plain)
    for content in nodes.seen:
        assert not content.array_records or all(
            not record for record in content.array_records.values()
        )
        assert not content.metric_records or all(
            set(record) <= {"num_examples"} for record in content.metric_records.values()
        )


@pytest.mark.parametrize(
    "stage", [Stage.SETUP, Stage.SHARE_KEYS, Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK]
)
def test_a_client_may_drop_out_at_every_stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    nodes = Nodes(monkeypatch, tmp_path, 6, {102: stage, 104: stage})
    active, total, _ = nodes.sum()
    there = [n for n in nodes.vectors if n not in nodes.gone or stage == Stage.UNMASK]
    assert sorted(active) == there
    np.testing.assert_allclose(
        total.numpy(), np.sum([nodes.vectors[n] for n in there], axis=0), atol=12 / LEVELS
    )


@pytest.mark.parametrize("stage", [Stage.SHARE_KEYS, Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK])
def test_too_many_dropouts_open_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    nodes = Nodes(monkeypatch, tmp_path, 6, {102: stage, 103: stage, 104: stage})
    with pytest.raises(SecureSumError, match="of 6 clients are left, 4 are needed"):
        nodes.sum()


def test_clients_refuse_a_server_that_asks_for_too_much(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nodes = Nodes(monkeypatch, tmp_path, 5)

    def both_secrets(stage: str, record: ConfigRecord) -> None:
        if stage == Stage.UNMASK:
            record[Key.DEAD_NODE_ID_LIST] = [100]

    nodes.tamper = both_secrets
    with pytest.raises(SecureSumError):
        nodes.sum()
    assert all("both secrets" in error for error in nodes.errors)
    nodes = Nodes(monkeypatch, tmp_path, 5)

    def low_threshold(stage: str, record: ConfigRecord) -> None:
        if stage == Stage.SETUP:
            record[Key.THRESHOLD] = 2

    nodes.tamper = low_threshold
    with pytest.raises(SecureSumError):
        nodes.sum()
    assert all("threshold 2" in error for error in nodes.errors)
    with pytest.raises(SecureSumError, match="secure sums take from 3"):
        Nodes(monkeypatch, tmp_path, 2).sum()


GREEDY: dict[str, Callable[[str, int, ConfigRecord], None]] = {
    "weights of nought for all but one": lambda stage, node, record: (
        record.__setitem__(Key.MAX_WEIGHT, 1e30) if stage == Stage.SETUP and node != 100 else None
    ),
    "numbers cut off for all but one": lambda stage, node, record: (
        record.__setitem__(Key.CLIPPING_RANGE, 1e30)
        if stage == Stage.SETUP and node != 100
        else None
    ),
    "a threshold of half": lambda stage, node, record: (
        record.__setitem__(Key.THRESHOLD, 4) if stage == Stage.SETUP else None
    ),
    "shares of one client, many times": lambda stage, node, record: (
        _repeat(record) if stage == Stage.COLLECT_MASKED_VECTORS else None
    ),
    "an opening without one that has begun it": lambda stage, node, record: (
        _swap(record, Key.ACTIVE_NODE_ID_LIST, lambda a: a[:-1]) if stage == Stage.UNMASK else None
    ),
    "one client many times in an opening": lambda stage, node, record: (
        _swap(record, Key.ACTIVE_NODE_ID_LIST, lambda a: [a[0]] * len(a))
        if stage == Stage.UNMASK
        else None
    ),
}


def _repeat(record: ConfigRecord) -> None:
    for key in (Key.SOURCE_LIST, Key.CIPHERTEXT_LIST):
        _swap(record, key, lambda values: [values[0]] * len(values))


@pytest.mark.parametrize("name", GREEDY)
def test_clients_refuse_what_would_show_one_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    nodes = Nodes(monkeypatch, tmp_path, 7)
    nodes.tamper_each = GREEDY[name]
    with pytest.raises(SecureSumError, match="clients are left, 5 are needed"):
        nodes.sum()
    assert len(nodes.errors) >= 6


def test_masks_of_other_requests_do_not_cancel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A server that asks one client for its numbers, and the others for nothing."""
    nodes = Nodes(monkeypatch, tmp_path, 6)
    requests = {
        n: RecordDict({"fedvpa": ConfigRecord({"blob": b"x" if n == 100 else b"scaled away"})})
        for n in nodes.vectors
    }
    with pytest.raises(SecureSumError, match="the masks do not cancel"):
        secure_sum(requests, SIZE, nodes.exchange)


def test_the_same_numbers_are_opened_in_one_sum_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A second sum over other clients would show the difference; the same sum again is fine."""
    nodes = Nodes(monkeypatch, tmp_path, 6)
    nodes.sum()
    nodes.sum()
    nodes.gone = {103: Stage.COLLECT_MASKED_VECTORS}
    with pytest.raises(SecureSumError, match="of 5 clients are left, 4 are needed"):
        nodes.sum()
    assert "the difference of two sums would show single clients" in nodes.errors[-1]
    # also by a client that was started anew
    nodes.clients = {
        n: SecureSums(partial(nodes.answer, n), tmp_path / f"{n}.txt", 3) for n in nodes.vectors
    }
    with pytest.raises(SecureSumError):
        nodes.sum()
    nodes.subject = "round 1"
    assert len(nodes.sum().nodes) == 5


def test_a_sum_over_fewer_than_were_asked_for_is_not_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nodes = Nodes(monkeypatch, tmp_path, 6, {103: Stage.COLLECT_MASKED_VECTORS})
    with pytest.raises(SecureSumError, match="5 clients are left, 6 are asked for"):
        nodes.sum(least=6)
    assert not list(tmp_path.glob("*.txt"))  # nobody was asked for what opens it


def _swap(record: ConfigRecord, key: str, change: Callable[[list], list]) -> None:  # type: ignore[type-arg]
    record[key] = change(list(record[key]))  # type: ignore[arg-type]


DEVIATIONS: dict[str, tuple[str, Callable[[ConfigRecord], None], bool]] = {
    "a key that is none": (
        Stage.SETUP, lambda r: r.__setitem__(Key.PUBLIC_KEY_1, b"key"), False),
    "no key": (Stage.SETUP, lambda r: r.__delitem__(Key.PUBLIC_KEY_2), False),
    "shares for strangers": (
        Stage.SHARE_KEYS, lambda r: _swap(r, Key.DESTINATION_LIST, lambda d: [7, *d[1:]]), False),
    "a share too few": (
        Stage.SHARE_KEYS, lambda r: _swap(r, Key.CIPHERTEXT_LIST, lambda c: c[1:]), False),
    "a vector of another length": (
        Stage.COLLECT_MASKED_VECTORS,
        lambda r: _swap(r, Key.MASKED_PARAMETERS, lambda p: p[:-1]), False),
    "a vector that is none": (
        Stage.COLLECT_MASKED_VECTORS,
        lambda r: r.__setitem__(Key.MASKED_PARAMETERS, [b"\x93NUMPY"]), False),
    "a share twice": (
        Stage.UNMASK, lambda r: _swap(r, Key.NODE_ID_LIST, lambda n: [n[0], n[0], *n[2:]]), True),
    "shares that open nothing": (
        Stage.UNMASK,
        lambda r: _swap(r, Key.SHARE_LIST, lambda s: [bytes(b ^ 1 for b in x) for x in s]), True),
}  # fmt: skip


@pytest.mark.parametrize("name", DEVIATIONS)
def test_a_client_that_deviates_is_named_and_the_others_are_summed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    stage, change, counts = DEVIATIONS[name]
    nodes = Nodes(monkeypatch, tmp_path, 6)
    nodes.lie = lambda at, node, record: change(record) if (at, node) == (stage, 102) else None
    found = nodes.sum()
    # a wrong share may be its dealer's doing: nobody is blamed for it
    assert list(found.culprits) == ([] if name == "shares that open nothing" else [102])
    there = sorted(nodes.vectors.keys() - (set() if counts else {102}))
    assert sorted(found.nodes) == there
    np.testing.assert_allclose(
        found.values.numpy(), np.sum([nodes.vectors[n] for n in there], axis=0), atol=12 / LEVELS
    )


def test_what_one_client_can_spoil_opens_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Numbers that are masked otherwise than agreed, and shares that others cannot read: the sum
    fails, nobody is named, and nobody is shown."""
    nodes = Nodes(monkeypatch, tmp_path, 6)

    def other_masks(stage: str, node: int, record: ConfigRecord) -> None:
        if (stage, node) == (Stage.COLLECT_MASKED_VECTORS, 102):
            other = [bytes_to_ndarray(b) ^ 1 for b in record[Key.MASKED_PARAMETERS]]  # type: ignore[union-attr]
            record[Key.MASKED_PARAMETERS] = [ndarray_to_bytes(b) for b in other]

    nodes.lie = other_masks
    with pytest.raises(SecureSumError, match="the masks do not cancel"):
        nodes.sum()
    nodes = Nodes(monkeypatch, tmp_path / "second", 6)
    nodes.lie = lambda stage, node, record: (
        _swap(record, Key.CIPHERTEXT_LIST, lambda c: [bytes(100) for _ in c])
        if (stage, node) == (Stage.SHARE_KEYS, 102)
        else None
    )
    with pytest.raises(SecureSumError, match="clients are left, 4 are needed"):
        nodes.sum()


def test_masks_use_the_whole_secret() -> None:
    """Two secrets that fold to the same 32 bits (which is all that Flower's own generator reads)
    give different masks."""
    first, second = bytes(32), b"\x01\x00\x00\x00\x01" + bytes(27)
    a, b = (masks.keystream(s, MODULUS, [(), (1000,)]) for s in (first, second))
    assert [x.shape for x in a] == [(), (1000,)]
    assert (a[1] != b[1]).mean() > 0.99
    assert all(
        np.array_equal(x, y) for x, y in zip(a, masks.keystream(first, MODULUS, [(), (1000,)]))
    )
    assert 0 <= a[1].min() < MODULUS * 0.01 < MODULUS * 0.99 < a[1].max() < MODULUS
    with pytest.raises(AttributeError, match="another way"):
        masks.replace_generator(np)


def test_flat_vectors_keep_names_apart_and_refuse_what_would_be_cut_off() -> None:
    tensors = {
        "delta/w": torch.randn(2, 3),
        "loss/recon": torch.tensor(0.7),
        "moments/squared": torch.rand(2, 2) * 100,
    }
    vector = torch.from_numpy(np.frombuffer(flatten("train", tensors), dtype="<f4").copy()).double()
    assert vector.abs().max() <= 1
    shapes = {k: (tuple(v.shape), torch.float32) for k, v in tensors.items()}
    back = unflatten("train", vector, shapes)
    for name, value in tensors.items():
        torch.testing.assert_close(back[name], value)
    bound = field_of("train", "delta/w").bound
    wide = {"delta/w": torch.tensor([bound * 1.01, -bound * 1e9, torch.nan, torch.inf, 0.0])}
    # to refuse would tell the server how large they are
    assert np.frombuffer(flatten("train", wide), dtype="<f4").tolist() == [1.0, -1.0, 0.0, 0.0, 0.0]
