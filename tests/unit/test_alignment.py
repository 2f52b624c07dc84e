"""The policy: z off is the base model, a zero shift is TRL's DPO step for step, padding changes
nothing, files come back."""

from __future__ import annotations

import io
import json
import math
import stat
from collections.abc import Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from fedvpa.errors import BadInputError
from fedvpa.experiment.selectors import SharedRewardModel
from fedvpa.features.chat import ChatFormat
from fedvpa.policy.align import Candidate, choose
from fedvpa.policy.card import PARTS, PolicyCard, load_card, save_card
from fedvpa.policy.conditioning import PreferenceConditioner, attach
from fedvpa.policy.dpo import ConditionalDPOTrainer, PreferenceCollator, last_checkpoint
from fedvpa.policy.export import export_adapter, export_merged
from fedvpa.policy.federated_dpo import _average
from fedvpa.policy.policy import Policy, Sampling, load_policy, new_conditioner, whole_sentences
from fedvpa.policy.prompts import in_style, read_prompts, read_styles
from fedvpa.policy.sampling import draw_from_nucleus
from fedvpa.policy.training import by_prompt
from fedvpa.records import Item, Message

FORMS = ("gate", "prefix", "shift")
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
PROMPTS = [
    (Message("user", "is tea good"),),
    (Message("user", "please help a friend ask"),),
    (Message("user", "stop"),),
]


def card_of(form: str = "gate") -> PolicyCard:
    return PolicyCard(
        "", "", form, {"a": [1.0, 0.0], "b": [-1.0, 1.0]}, [0.0, 0.5], [0.0, 0.5], 2.0, "run"
    )  # type: ignore[arg-type]


def based_on(folder: Path, form: str) -> PolicyCard:
    return replace(card_of(form), base=str(folder))


def policy_of(folder: Path, form: str = "gate", loud: float = 0.0) -> Policy:
    """A policy on the tiny model; `loud` makes adapter and conditioner far from what they start
    as."""
    torch.manual_seed(0)
    base, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    conditioner = new_conditioner(card_of(form), base, tokenizer, 4, 3)
    own = deepcopy(LORA)
    own.base_model_name_or_path = None  # or that of whom it was used for before
    model = get_peft_model(base, own)
    attach(model, conditioner)
    if loud:
        with torch.no_grad():
            for name, value in model.named_parameters():
                if value.requires_grad or "conditioner" in name:
                    value.add_(torch.randn(value.shape) * loud)
    return Policy(model.eval(), tokenizer)


@pytest.mark.parametrize("form", FORMS)
def test_without_z_the_policy_is_the_base_model(form: str, tiny_model: Path) -> None:
    policy = policy_of(tiny_model, form, loud=0.5)
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    ids = torch.tensor([policy.prompt_ids(PROMPTS[1])])
    with torch.no_grad(), policy.model.disable_adapter():
        assert torch.equal(policy.model(input_ids=ids).logits, base(input_ids=ids).logits)
    greedy = Sampling(8, 0.0)
    expected = base.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )[0, ids.shape[1] :]
    text = policy.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert policy.respond(PROMPTS[1], None, greedy) == text


@pytest.mark.parametrize("form", FORMS)
def test_generation_under_z_follows_the_trained_forward_and_ignores_padding(
    form: str, tiny_model: Path
) -> None:
    policy = policy_of(tiny_model, form, loud=0.5)
    z = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.3, 0.3]])
    greedy = Sampling(6, 0.0, batch=3)
    together = {
        i: t
        for batch in policy.sample(PROMPTS, z, greedy, 0)
        for i, t in zip(batch.rows, batch.texts)
    }
    for i, prompt in enumerate(PROMPTS):
        assert policy.respond(prompt, z[i], greedy) == together[i]
        ids = policy.prompt_ids(prompt)
        start = len(ids)
        for _ in range(6):  # the forward pass that is trained, one token at a time
            with torch.no_grad():
                logits = policy.model(input_ids=torch.tensor([ids]), preference=z[i : i + 1]).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] in policy.stops:
                break
        assert policy.tokenizer.decode(ids[start:], skip_special_tokens=True).strip() == together[i]
    assert len(set(together.values())) > 1


def test_a_draw_is_one_of_the_nucleus_with_its_probability() -> None:
    torch.manual_seed(0)
    logits = torch.randn(400) * 2
    # the nucleus of the second lies beyond the tokens that are looked at first
    narrow, wide = logits.clone(), logits * 0.05
    for scores, temperature, top_p in ((narrow, 0.7, 0.9), (wide, 1.0, 0.9), (narrow, 1.5, 1.0)):
        drawn = draw_from_nucleus(scores.expand(40_000, -1), temperature, top_p)
        probability, order = (scores / temperature).softmax(-1).sort(descending=True)
        kept = probability.cumsum(-1) - probability < top_p
        expected = torch.zeros(400).scatter(
            0, order, probability * kept / (probability * kept).sum()
        )
        found = torch.bincount(drawn, minlength=400) / len(drawn)
        assert found[expected == 0].sum() == 0
        # chi-square
        assert (
            float(((found - expected).square() / expected.clamp_min(1e-12))[expected > 0].sum())
            * 40_000
            < 520
        )
    assert int((wide.softmax(-1).sort(descending=True).values.cumsum(-1) < 0.9).sum()) > 256
    assert draw_from_nucleus(logits[None], 0.0, 0.9) == logits.argmax()


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_end_early_change_nothing_for_the_others(form: str, tiny_model: Path) -> None:
    policy = policy_of(tiny_model, form, loud=0.5)
    prompts, z = PROMPTS * 4, torch.randn(12, 2, generator=torch.Generator().manual_seed(1))
    said = [policy.respond(p, row, Sampling(12, 0.0)).split() for p, row in zip(prompts, z)]
    ends = {
        word: {text.index(word) if word in text else 12 for text in said}
        for text in said
        for word in text
    }
    # the word that rows come to after different times
    varied = max(ends, key=lambda word: len(ends[word]))
    policy.stops = [policy.tokenizer.convert_tokens_to_ids(varied)]
    alone = [policy.respond(p, row, Sampling(12, 0.0)) for p, row in zip(prompts, z)]
    [batch] = policy.sample(prompts, z, Sampling(12, 0.0, batch=12), 0)
    assert [alone[i] for i in batch.rows] == batch.texts
    assert len({len(text.split()) for text in alone}) > 1


def test_a_response_that_the_limit_ended_is_trained_without_an_end() -> None:
    collator = PreferenceCollator(pad_token_id=0, stops=(9,))
    rows = {
        "prompt_ids": [1, 2],
        "chosen_ids": [3, 4, 9, 5],
        "rejected_ids": [6, 9, 5],
        "preference": [0.5],
    }
    whole = collator([rows])
    assert whole["input_ids"].tolist() == [[1, 2, 3, 4, 9, 5], [1, 2, 6, 9, 5, 0]]
    cut = collator([rows | {"chosen_ended": False, "rejected_ended": True}])
    assert cut["input_ids"].tolist() == [[1, 2, 3, 4, 0], [1, 2, 6, 9, 5]]
    assert cut["completion_mask"].tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_soft_tokens_are_attended_to_and_never_predicted() -> None:
    conditioner = PreferenceConditioner.soft_tokens(torch.zeros(2), 1.0, torch.ones(5), 0.1, 3, 0)
    out = conditioner.embed(
        torch.ones(2, 2),
        torch.zeros(2, 4, 5),
        torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
        torch.arange(8).view(2, 4),
    )
    assert out["inputs_embeds"].shape == (2, 7, 5)
    assert out["attention_mask"].tolist() == [[1, 1, 1, 0, 1, 1, 1], [1] * 7]
    assert out["labels"][:, :3].eq(-100).all()
    assert out["labels"][:, 3:].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_gates_start_shared_and_opposite_and_are_plain_lora_where_nothing_differs() -> None:
    centre = torch.tensor([0.0, 0.5])
    two = PreferenceConditioner.gates(centre, 2.0, torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), 6)
    gates = two(torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, 0.5]])).squeeze(1)
    assert torch.allclose(gates[:2, :3].abs(), torch.ones(2, 3), atol=1e-5)
    assert torch.allclose(gates[0, :3], -gates[1, :3], atol=1e-5)
    assert torch.allclose(gates[2, :3], torch.zeros(3), atol=1e-5)
    assert torch.equal(gates[:, 3:], torch.ones(3, 3))
    three = PreferenceConditioner.gates(torch.zeros(4), 1.0, torch.eye(4)[:3], 8)(
        torch.eye(4)[:3]
    ).squeeze(1)
    assert torch.linalg.matrix_rank(three[:, :4] - three[:, :4].mean(0), rtol=1e-4) == 2
    assert torch.allclose(three[:, :4].square().mean(0), torch.ones(4), atol=1e-5)
    one = PreferenceConditioner.gates(torch.zeros(2), 1.0, torch.ones(1, 2), 4)
    assert torch.equal(one(torch.randn(3, 2)), torch.ones(3, 1, 4))


def pairs() -> list[dict[str, Any]]:
    words = ["yes tea is good", "no stop bad", "ask a friend .", "very very good help"]
    return [
        {
            "prompt": [{"role": "user", "content": PROMPTS[i % 3][0].content}],
            "chosen": [{"role": "assistant", "content": words[i % 4]}],
            "rejected": [{"role": "assistant", "content": words[(i + 1) % 4]}],
            "preference": [1.0, 0.0] if i % 2 else [-1.0, 1.0],
        }
        for i in range(12)
    ]


def arguments(out: Path, **more: Any) -> DPOConfig:
    return DPOConfig(
        output_dir=str(out), per_device_train_batch_size=4, num_train_epochs=2, learning_rate=2e-3,
        logging_steps=1, seed=3,
        precompute_ref_log_probs=True, report_to=[], disable_tqdm=True, use_cpu=True, bf16=False,
        save_strategy="no",
        gradient_checkpointing=False, max_length=None, **more,
    )  # fmt: skip


def trained(
    tiny_model: Path, out: Path, conditioner: PreferenceConditioner | None, **more: Any
) -> Any:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model),
        AutoTokenizer.from_pretrained(tiny_model),
    )
    data = Dataset.from_list(pairs())
    if conditioner is None:
        data = data.remove_columns("preference")
        trainer: Any = DPOTrainer(
            model=model,
            args=arguments(out),
            processing_class=tokenizer,
            train_dataset=data,
            peft_config=LORA,
        )
    else:
        trainer = ConditionalDPOTrainer(
            model=model, args=arguments(out, **more), processing_class=tokenizer,
            train_dataset=data, peft_config=LORA,
            data_collator=PreferenceCollator(pad_token_id=tokenizer.pad_token_id),
            conditioner=conditioner,
        )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_changes_no_gradient(form: str, tiny_model: Path) -> None:
    found = []
    for checkpointing in (False, True):
        policy = policy_of(tiny_model, form, loud=0.2)
        if checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.model.train()
        policy.model.conditioner.requires_grad_(True)
        ids = torch.tensor([policy.prompt_ids(PROMPTS[1])]).repeat(2, 1)
        z = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        policy.model(input_ids=ids, preference=z).logits.log_softmax(-1)[:, -1, 5].sum().backward()
        found.append(
            {
                name: p.grad.clone()
                for name, p in policy.model.named_parameters()
                if p.grad is not None
            }
        )
    assert found[0].keys() == found[1].keys()
    assert "conditioner.weight" in found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


@pytest.mark.parametrize("form", ["gate", "shift"])
def test_a_frozen_zero_shift_or_gates_of_one_are_trl_dpo_step_for_step(
    form: str, tiny_model: Path, tmp_path: Path
) -> None:
    base, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model),
        AutoTokenizer.from_pretrained(tiny_model),
    )
    conditioner = new_conditioner(card_of(form), base, tokenizer, 4, 3)
    conditioner.requires_grad_(False)
    if form == "gate":
        conditioner.weight.zero_()
        conditioner.start.fill_(1.0)
    ours, theirs = (
        trained(tiny_model, tmp_path / "a", conditioner),
        trained(tiny_model, tmp_path / "b", None),
    )
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (ours, theirs)]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for (name, a), (_, b) in zip(
        ((n, p) for n, p in ours.model.named_parameters() if "lora" in n),
        ((n, p) for n, p in theirs.model.named_parameters() if "lora" in n),
    ):
        torch.testing.assert_close(a, b, msg=name)


def test_conditional_dpo_learns_opposite_preferences_and_the_reference_is_the_base(
    tiny_model: Path, tmp_path: Path
) -> None:
    base, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model),
        AutoTokenizer.from_pretrained(tiny_model),
    )
    conditioner = new_conditioner(card_of(), base, tokenizer, 4, 3)
    before = conditioner.weight.detach().clone()
    trainer = trained(tiny_model, tmp_path / "run", conditioner)
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # it starts as the base model
    assert not torch.equal(conditioner.weight, before)
    row = trainer.train_dataset[0]
    ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
    with torch.no_grad():
        logits = base.eval()(input_ids=ids).logits.log_softmax(-1)
    picked = logits[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)[len(row["prompt_ids"]) - 1 :]
    assert row["ref_chosen_logps"] == pytest.approx(float(picked.sum()), abs=1e-4)


def test_the_reference_must_be_computed_beforehand(tiny_model: Path, tmp_path: Path) -> None:
    base, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model),
        AutoTokenizer.from_pretrained(tiny_model),
    )
    given = arguments(tmp_path)
    given.precompute_ref_log_probs = False
    with pytest.raises(ValueError, match="precompute_ref_log_probs"):
        ConditionalDPOTrainer(
            model=base, args=given, processing_class=tokenizer,
            train_dataset=Dataset.from_list(pairs()), peft_config=LORA,
            data_collator=PreferenceCollator(pad_token_id=0), conditioner=new_conditioner(card_of(),
            base, tokenizer, 4, 3),
        )  # fmt: skip


def test_checkpoints_without_a_conditioner_do_not_count(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_checkpoint(tmp_path) is None
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}/conditioner.safetensors").touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_preferences_have_names_and_can_be_mixed(tmp_path: Path) -> None:
    card = card_of()
    for name in PARTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    save_card(card, tmp_path)
    assert replace(load_card(tmp_path), checksum="") == card
    assert card.mix({"a": 1.0, "b": 3.0}).tolist() == [-0.5, 0.75]
    assert card.z("neutral").tolist() == [0.0, 0.5]
    with pytest.raises(BadInputError, match="no preference 'c' \\(known: a, b, neutral\\)"):
        card.z("c")
    with pytest.raises(BadInputError, match="not negative"):
        card.mix({"a": -1.0, "b": 2.0})
    with pytest.raises(BadInputError, match="no policy there"):
        load_policy(tmp_path / "nowhere")


def test_prompts_are_read_checked_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_model), "tiny")
    text = tmp_path / "p.txt"
    rows = ["\ufeffone", "", "two\u2028words\r", "one", "the <end>", "long " * 50]
    text.write_bytes("\n".join(rows).encode())
    found = read_prompts(str(text), None, 10, chat, to_train=True)
    assert [p[0].content for p in found.prompts] == ["one", "two\u2028words"]
    assert found.skipped == {
        "repetition": 1, "longer than 10 tokens": 1, "the name of a special token in it": 1,
    }  # fmt: skip
    assert len(read_prompts(str(text), None, 10, chat).prompts) == 3
    for group, names in {"a": "pqrst", "b": "tuv"}.items():
        (tmp_path / "groups" / group).mkdir(parents=True)
        lines = [json.dumps({"prompt": name, "chosen": "x", "rejected": "y"}) for name in names]
        (tmp_path / "groups" / group / "test.jsonl").write_text("\n".join(lines))
    grouped = read_prompts(str(tmp_path / "groups"), "test", 10, chat)
    assert grouped.groups == ["a"] * 4 + ["a & b"] + ["b"] * 2
    chosen, of = grouped.balanced(0, 0)
    assert (of, len(chosen)) == (["a", "a & b", "b"], 3)
    with pytest.raises(BadInputError, match="every one needs a prompt"):
        grouped.balanced(2, 0)
    rows = tmp_path / "p.jsonl"
    rows.write_text(
        '{"prompt": "hello"}\n{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant",'
        ' "content": "b"}]}\n'
    )
    with pytest.raises(BadInputError):
        read_prompts(str(tmp_path / "none.txt"), None, 10, chat)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(BadInputError, match="it is empty"):
        read_prompts(str(tmp_path / "empty.jsonl"), None, 10, chat)


@pytest.mark.parametrize("form", FORMS)
def test_an_exported_policy_gives_the_same_tokens_in_plain_transformers(
    form: str, tiny_model: Path, tmp_path: Path
) -> None:
    z, greedy = torch.tensor([1.0, -0.5]), Sampling(8, 0.0)
    policy = policy_of(tiny_model, form, loud=0.5)
    expected = [policy.respond(prompt, z, greedy) for prompt in PROMPTS]
    out = tmp_path / "plain"
    export_merged(policy_of(tiny_model, form, loud=0.5), z, out, based_on(tiny_model, form))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    found = []
    for prompt in PROMPTS:
        turns = [{"role": m.role, "content": m.content} for m in prompt]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        found.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
    assert found == expected
    assert any(found)
    with pytest.raises(BadInputError, match="not empty"):
        export_merged(policy, z, out, based_on(tiny_model, form))


@pytest.mark.parametrize("form", FORMS)
def test_an_exported_adapter_gives_the_same_tokens_in_plain_peft(
    form: str, tiny_model: Path, tmp_path: Path
) -> None:
    z, greedy = torch.tensor([1.0, -0.5]), Sampling(8, 0.0)
    policy = policy_of(tiny_model, form, loud=0.5)
    expected = [policy.respond(prompt, z, greedy) for prompt in PROMPTS]
    out = tmp_path / "adapter"
    export_adapter(policy, z, out, based_on(tiny_model, form), "kind")
    assert {stat.S_IMODE(f.stat().st_mode) for f in out.iterdir()} == {0o644}
    assert "`kind` built in" in (out / "README.md").read_text().replace("\n", " ")
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found = []
    for prompt in PROMPTS:
        given = code.replace('"."', repr(str(out))).replace(
            "How do I plan a week's meals?", prompt[0].content
        )
        given = given.replace("max_new_tokens=256", "max_new_tokens=8, do_sample=False")
        said = io.StringIO()
        with redirect_stdout(said):
            exec(given, {})
        found.append(said.getvalue().strip())
    assert found == expected
    assert any(found)
    assert sum(f.stat().st_size for f in out.glob("*.safetensors")) < 60_000
    with pytest.raises(BadInputError, match="not empty"):
        export_adapter(policy_of(tiny_model, form), z, out, based_on(tiny_model, form))


def test_a_response_that_was_cut_off_ends_with_a_whole_sentence() -> None:
    assert whole_sentences('One. "Two!" And thr') == 'One. "Two!"'
    assert whole_sentences("- a\n- b") == "- a"
    assert whole_sentences("no end at 3.5 of it") == "no end at 3.5 of it"


def test_only_responses_that_the_limit_ended_are_cut(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(tiny_model)
    stop = policy.stops[0]
    plain = next(i for i in range(50) if i not in policy.stops)
    monkeypatch.setattr(policy, "_draw", lambda *_: torch.tensor([[plain, stop], [plain, plain]]))
    monkeypatch.setattr(policy.tokenizer, "batch_decode", lambda *_, **__: ["One. Two", "One. Two"])
    [batch] = policy.sample(PROMPTS[:2], None, Sampling(2, whole=True), 0)
    assert (batch.texts, batch.ended, batch.tokens) == (["One. Two", "One."], [True, False], 4)
    [batch] = policy.sample(PROMPTS[:2], None, Sampling(2), 0)
    assert batch.texts == ["One. Two", "One. Two"]


def test_federated_averaging_weighs_clients_by_their_pairs(tmp_path: Path) -> None:
    for name, value in {"a": 1.0, "b": 5.0}.items():
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "adapter/adapter_config.json").write_text("{}")
        for file in ("adapter/adapter_model.safetensors", "conditioner.safetensors"):
            save_file({"w": torch.full((2,), value)}, tmp_path / name / file)
    _average([tmp_path / "a", tmp_path / "b"], [3, 1], tmp_path / "mean")
    assert load_file(tmp_path / "mean/conditioner.safetensors")["w"].tolist() == [2.0, 2.0]
    assert load_file(tmp_path / "mean/adapter/adapter_model.safetensors")["w"].tolist() == [
        2.0,
        2.0,
    ]


def test_styles_are_system_prompts_and_stand_behind_a_prompts_own(tmp_path: Path) -> None:
    file = tmp_path / "styles.txt"
    file.write_text("short\n\nlong\n")
    assert read_styles(str(file)) == ["short", "long"]
    own = (Message("system", "be kind"), Message("user", "hi"))
    assert in_style(own, "short") == (Message("system", "be kind\nshort"), Message("user", "hi"))
    assert in_style(own[1:], "short") == (Message("system", "short"), Message("user", "hi"))
    assert in_style(own, None) == own
    file.write_text("\n")
    with pytest.raises(BadInputError, match="is empty"):
        read_styles(str(file))
    with pytest.raises(BadInputError, match="cannot be read"):
        read_styles(str(tmp_path / "none"))


def test_opposite_preferences_on_a_prompt_are_trained_on_side_by_side() -> None:
    rows = [
        {"prompt": [{"role": "user", "content": p}], "preference": [z]}
        for z in (1.0, -1.0)
        for p in "abcd"
    ]
    ordered = by_prompt(rows, 0)
    assert [ordered[i]["prompt"] for i in range(0, 8, 2)] == [
        ordered[i]["prompt"] for i in range(1, 8, 2)
    ]
    assert sorted(str(r) for r in ordered) == sorted(str(r) for r in rows)
    assert by_prompt(rows, 0) == ordered != by_prompt(rows, 1)


class _Longest(SharedRewardModel):
    """Stands for a selector that prefers long responses under z > 0, short ones under z < 0."""

    def __init__(self) -> None:
        pass

    def score(self, items: Sequence[Item], z: torch.Tensor) -> torch.Tensor:
        return torch.tensor([float(len(item.response)) for item in items]) * z[:, 0].sign()


@pytest.mark.parametrize("ended_only", [False, True])
def test_what_the_limit_cut_off_may_be_rejected_but_not_chosen(ended_only: bool) -> None:
    prompts = [(Message("user", "a"),)]
    drawn = [[Candidate("x" * n, n < 4) for n in (1, 2, 3, 4, 5, 6)]]
    z = {"long": torch.ones(1, 1), "short": -torch.ones(1, 1)}
    rows, counts = choose(_Longest(), prompts, dict.fromkeys(z, drawn), z, 0.1, 2, ended_only)
    pairs = {
        (r["preference"][0] > 0, len(r["chosen"][0]["content"]), len(r["rejected"][0]["content"]))
        for r in rows
    }
    short = {(False, 1, 6), (False, 2, 5)}
    # the second best that ended is no longer than the second worst: nothing to be learned from it
    assert pairs == short | ({(True, 3, 1)} if ended_only else {(True, 6, 1), (True, 5, 2)})
    assert counts["dropped_under_margin"] == int(ended_only)
