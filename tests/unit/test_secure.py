"""Secure sums: exact up to rounding, survive dropouts, and show the server nothing but masked
vectors and the sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common import bytes_to_ndarray
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.supercore.task_identity import TaskIdentity

from fedvpa.federated.exchanges import field_of
from fedvpa.network import masks, relay
from fedvpa.network.secure import LEVELS, MODULUS, SecureSumError, secure_sum
from fedvpa.network.wire import WireError, flatten, unflatten

SIZE = 40


class Nodes:
    """Clients with a vector each, behind the app that a node runs; some do not answer from a
    stage on."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, count: int, gone: Mapping[int, str] = {}
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.vectors = {
            100 + i: (torch.rand(SIZE, generator=generator) * 2 - 1).numpy() for i in range(count)
        }
        self.contexts = {
            n: Context(1, n, {"relay": str(n), "min-cohort": 3}, RecordDict(), {})
            for n in self.vectors
        }
        self.gone, self.seen, self.errors = gone, [], list[str]()
        self.tamper: Callable[[str, ConfigRecord], None] = lambda stage, record: None
        for name in ("_run_id", "_task_id", "_node_id"):
            monkeypatch.setattr(TaskIdentity, name, 1, raising=False)
        monkeypatch.setattr(
            relay,
            "through",
            lambda m, c: b"\x01" + self.vectors[int(c.node_config["relay"])].tobytes(),
        )

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
            message = Message(content, dst_node_id=node, message_type="train")
            message.metadata.__dict__["_message_id"] = "m"
            try:
                reply = relay._secure(message, self.contexts[node], relay.masked)
            except Exception as error:
                self.errors.append(str(error))
                out[node] = str(error)
                continue
            self.seen.append(reply.content)
            out[node] = reply.content
        return out

    def sum(self) -> tuple[list[int], torch.Tensor]:
        requests = {n: RecordDict({"fedvpa": ConfigRecord({"blob": b"x"})}) for n in self.vectors}
        return secure_sum(requests, SIZE, self.exchange)


@pytest.mark.parametrize("count", [3, 7])
def test_the_sum_is_right_and_only_masked_vectors_are_seen(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    nodes = Nodes(monkeypatch, count)
    active, total = nodes.sum()
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
def test_a_client_may_drop_out_at_every_stage(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    nodes = Nodes(monkeypatch, 6, {102: stage, 104: stage})
    active, total = nodes.sum()
    there = [n for n in nodes.vectors if n not in nodes.gone or stage == Stage.UNMASK]
    assert sorted(active) == there
    np.testing.assert_allclose(
        total.numpy(), np.sum([nodes.vectors[n] for n in there], axis=0), atol=12 / LEVELS
    )


@pytest.mark.parametrize("stage", [Stage.SHARE_KEYS, Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK])
def test_too_many_dropouts_open_nothing(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    nodes = Nodes(monkeypatch, 6, {102: stage, 103: stage, 104: stage})
    with pytest.raises(SecureSumError, match="of 6 clients are left, 4 are needed"):
        nodes.sum()


def test_clients_refuse_a_server_that_asks_for_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes(monkeypatch, 5)

    def both_secrets(stage: str, record: ConfigRecord) -> None:
        if stage == Stage.UNMASK:
            record[Key.DEAD_NODE_ID_LIST] = [100]

    nodes.tamper = both_secrets
    with pytest.raises(SecureSumError):
        nodes.sum()
    assert all("both secrets" in error for error in nodes.errors)
    nodes = Nodes(monkeypatch, 5)

    def low_threshold(stage: str, record: ConfigRecord) -> None:
        if stage == Stage.SETUP:
            record[Key.THRESHOLD] = 2

    nodes.tamper = low_threshold
    with pytest.raises(SecureSumError):
        nodes.sum()
    assert all("threshold 2" in error for error in nodes.errors)
    with pytest.raises(SecureSumError, match="secure sums take from 3"):
        Nodes(monkeypatch, 2).sum()


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
    with pytest.raises(WireError, match="delta/w"):
        flatten("train", {"delta/w": torch.tensor([field_of("train", "delta/w").bound * 1.01])})
    with pytest.raises(WireError, match="not finite"):
        flatten("train", {"delta/w": torch.tensor([torch.nan])})
