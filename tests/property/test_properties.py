"""Laws that hold for whatever comes: parsers, the reader, partitioners, distributions."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvpa.data.messages import tidy
from fedvpa.data.partition import Partitioner
from fedvpa.data.preferences import pairs_of
from fedvpa.data.reading import read_pairs
from fedvpa.errors import BadInputError, RecordError
from fedvpa.federated.episodes import DrawSizes, Episodes, local_draws
from fedvpa.functional.gaussian import standard_kl_per_dimension
from fedvpa.records import Message, PreferencePair
from fedvpa.types import PairBatch

plain = st.text(
    st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=40
).filter(lambda s: s.strip())
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(plain, plain, plain)
def test_an_explicit_prompt_comes_back_as_it_was(prompt: str, a: str, b: str) -> None:
    record = {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": a}],
        "rejected": [{"role": "assistant", "content": b}],
    }
    if a.strip() == b.strip():
        with pytest.raises(RecordError, match="identical"):
            pairs_of(record, "f:1")[0]
        return
    found = pairs_of(record, "f:1")[0]
    assert (found.prompt, found.chosen, found.rejected) == (
        (Message("user", tidy(prompt)),),
        tidy(a),
        tidy(b),
    )
    assert found.content_key() == found.reversed().content_key()
    assert found.chosen_is_first() != found.reversed().chosen_is_first()


@given(
    st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "client_id", "group"]), values)
)
def test_any_record_is_parsed_or_refused_and_nothing_else(record: dict[str, object]) -> None:
    try:
        found = pairs_of(record, "f:1")[0]
    except RecordError as error:
        assert error.where == "f:1"
    else:
        assert found.chosen.strip()
        assert found.rejected.strip()
        assert found.chosen != found.rejected


def test_a_thousand_broken_files_are_refused_or_read_and_never_crash(tmp_path: Path) -> None:
    chance = random.Random(0)
    good = json.dumps({"prompt": "Is tea good?", "chosen": "It is.", "rejected": "No."}).encode()
    refused = 0
    for i in range(1000):
        raw = bytearray(b"\n".join([good] * chance.randint(1, 3)))
        for _ in range(chance.randint(1, 6)):
            kind, at = chance.randrange(4), chance.randrange(len(raw))
            if kind == 0:
                raw[at] = chance.randrange(256)
            elif kind == 1:
                del raw[at : at + chance.randint(1, 20)]
            elif kind == 2:
                raw[at:at] = bytes(chance.randrange(256) for _ in range(3))
            else:
                raw = raw[: max(1, at)]
            if not raw:
                raw = bytearray(b" ")
        file = tmp_path / f"{i % 7}.{chance.choice(['jsonl', 'jsonl.gz', 'parquet'])}"
        file.write_bytes(bytes(raw))
        try:
            pairs = read_pairs(str(file)).pairs
            assert all(p.chosen != p.rejected for p in pairs)
        except BadInputError as error:
            refused += 1
            assert str(file) in str(error)
    assert refused > 500


@settings(deadline=None)
@given(
    st.integers(2, 60),
    st.integers(1, 8),
    st.sampled_from(["group", "dirichlet", "mixed"]),
    st.integers(0, 5),
)
def test_partitions_lose_and_repeat_nothing(count: int, clients: int, kind: str, seed: int) -> None:
    pairs = [
        PreferencePair((Message("user", f"q{i}"),), "a", "b", None, "xyz"[i % 3], f"f:{i}")
        for i in range(count)
    ]
    try:
        parts = Partitioner(clients, kind)(pairs, seed)
    except BadInputError:
        return
    dealt = [p.source for c in parts for p in c.pairs]
    assert len(dealt) == len(set(dealt))
    if kind != "dirichlet":  # there clients are equally large, and a remainder stays out
        assert len(dealt) == count
    assert parts == Partitioner(clients, kind)(pairs, seed)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(0, 10),
    st.floats(0.1, 0.9),
    st.integers(0, 3),
)
def test_context_and_target_are_disjoint_real_pairs(
    sizes: list[int], batch: int, share: float, seed: int
) -> None:
    width = max(sizes)
    mask = torch.arange(width) < torch.tensor(sizes).unsqueeze(-1)
    x = torch.arange(len(sizes) * width, dtype=torch.float32).view(
        len(sizes), width, 1
    ) * mask.unsqueeze(-1)
    names = [f"c{i}" for i in range(len(sizes))]
    draws = local_draws(seed, 0, names, torch.tensor(sizes), 3, DrawSizes(1, 2))
    episodes = Episodes(PairBatch(x, None, mask.float(), mask), draws.order, batch, share)
    for step in range(3):
        pairs, context, target, _ = episodes[step]
        assert not (context & target).any()
        assert not ((context | target) & ~pairs.mask).any()
        used = (context | target).sum(-1)
        expected = torch.tensor([min(n, batch) if batch else n for n in sizes])
        assert torch.equal(used, expected)
        assert (target.sum(-1) >= 1).all()
    alone = local_draws(seed, 0, names[:1], torch.tensor(sizes[:1]), 3, DrawSizes(1, 2))
    assert torch.equal(alone.order, draws.order[:, : sizes[0]])
    assert torch.equal(alone.latent[:, :, 0], draws.latent[:, :, 0])


@given(
    st.lists(st.floats(-20, 20), min_size=2, max_size=2),
    st.lists(st.floats(-7, 7), min_size=2, max_size=2),
)
def test_kl_is_never_negative(mean: list[float], log_var: list[float]) -> None:
    assert (standard_kl_per_dimension(torch.tensor(mean), torch.tensor(log_var)) >= -1e-6).all()
