"""Features of a tiny random Llama: padding, packing, truncation, and the cache."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from fedvpa.config import FeaturesConfig
from fedvpa.errors import BadInputError
from fedvpa.features.backbone import Backbone, Tap
from fedvpa.features.cache import FeatureCache
from fedvpa.features.loading import load_causal_model
from fedvpa.records import Item, Message
from tests.conftest import WORDS

TAPS = [Tap(2, "last"), Tap(3, "mean")]


def items(count: int) -> list[Item]:
    prompts = [
        tuple(Message("user", " ".join(WORDS[: 1 + (i // 2) % 9])) for _ in range(1))
        for i in range(count)
    ]
    return [Item(prompts[i], " ".join(WORDS[i % 7 : i % 7 + 1 + i % 5])) for i in range(count)]


@pytest.fixture(scope="module")
def backbone(tiny_model: Path) -> Backbone:
    return Backbone(str(tiny_model), dtype=torch.float32)


def test_neighbours_and_padding_change_nothing(backbone: Backbone) -> None:
    texts = items(32)
    together = backbone.encode(texts, TAPS, token_budget=100_000)
    alone = torch.cat([backbone.encode([item], TAPS, token_budget=1) for item in texts])
    assert backbone.packed
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(
        backbone.encode(texts[::-1], TAPS).flip(0), together, atol=2e-5, rtol=1e-4
    )


def test_one_prompt_read_for_many_responses_is_the_same_as_reading_it_for_each(
    backbone: Backbone,
) -> None:
    texts = items(24)
    packed = backbone.encode(texts, TAPS)
    backbone.packed = False
    try:
        plain = backbone.encode(texts, TAPS)
    finally:
        backbone.packed = True
    torch.testing.assert_close(packed, plain, atol=2e-5, rtol=1e-4)
    assert (packed[0] - packed[1]).abs().max() > 0.01


def test_features_are_the_hidden_states_of_transformers(
    backbone: Backbone, tiny_model: Path
) -> None:
    from transformers import AutoModelForCausalLM

    item = items(3)[2]
    ready = backbone.prepare([item])[0]
    ids = torch.tensor([ready.prompt + ready.reply])
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    hidden = model(ids, output_hidden_states=True).hidden_states
    begin = len(ready.prompt)
    found = backbone.encode([item], [Tap(2, "last"), Tap(2, "mean")])[0]
    torch.testing.assert_close(found[0], hidden[2][0, -1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], hidden[2][0, begin:].mean(0), atol=1e-5, rtol=1e-4)


def test_the_limits_are_those_of_the_texts(tiny_model: Path) -> None:
    short = Backbone(
        str(tiny_model), max_prompt_tokens=4, max_response_tokens=3, dtype=torch.float32
    )
    item = Item((Message("user", "tea is good"),), "a b c d e")
    whole, cut = (b.prepare([item])[0] for b in (Backbone(str(tiny_model)), short))
    assert (len(cut.prompt), len(cut.reply)) == (4, 3)
    assert cut.prompt == [whole.prompt[0], *whole.prompt[-3:]]
    assert cut.reply == [*whole.reply[:2], whole.reply[-1]]


def test_unknown_backbones_and_layers_are_refused(tiny_model: Path, backbone: Backbone) -> None:
    with pytest.raises(BadInputError, match=r"layer: 9 is not a layer of .*, which has 1 to 3"):
        backbone.encode(items(1), [Tap(9, "last")])
    with pytest.raises(BadInputError, match="model 'no-such-model' cannot be loaded"):
        Backbone("no-such-model")


def test_cache_computes_each_text_once_and_tells_settings_apart(
    tiny_model: Path, tmp_path: Path
) -> None:
    settings = FeaturesConfig(backbone=str(tiny_model), layer=2, pooling="last", dtype="float32")
    texts = items(8)
    first, _, signature, computed, _ = FeatureCache(settings, tmp_path / "f.sqlite").items(texts)
    assert computed == len(set(texts))
    again = FeatureCache(settings, tmp_path / "f.sqlite")
    second, _, same, none, _ = again.items(texts[::-1])
    assert none == 0
    assert again._backbone is None  # what is cached does not need the model
    assert same == signature
    assert torch.equal(second.flip(0), first)
    mean = FeatureCache(settings.model_copy(update={"pooling": "mean"}), tmp_path / "f.sqlite")
    third, _, other, computed, _ = mean.items(texts)
    assert computed == len(set(texts))
    assert other != signature
    assert not torch.equal(third, first)
    middle = FeatureCache(settings.model_copy(update={"layer": 0}), tmp_path / "f.sqlite")
    assert "layer=1" in middle.items(texts[:1])[2]


def fill(folder: str, path: str) -> None:
    torch.set_num_threads(1)
    FeatureCache(FeaturesConfig(backbone=folder, layer=2, dtype="float32"), Path(path)).items(
        items(40)
    )


@pytest.mark.slow
def test_four_processes_share_a_cache_and_a_killed_one_harms_nothing(
    tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "f.sqlite"
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=fill, args=(str(tiny_model), str(path))) for _ in range(4)]
    for process in both:
        process.start()
    both[3].join(4)
    both[3].kill()
    for process in both[:3]:
        process.join()
        assert process.exitcode == 0
    values, _, _, computed, _ = FeatureCache(
        FeaturesConfig(backbone=str(tiny_model), layer=2, dtype="float32"), path
    ).items(items(40))
    assert computed == 0
    assert values.isfinite().all()


def test_a_policy_s_base_model_has_one_name_in_every_number_type(tiny_model: Path) -> None:
    names = {
        load_causal_model(str(tiny_model), dtype, "cpu").revision
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(names) == 1
