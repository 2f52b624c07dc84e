"""A policy with one preference built in: a directory that plain transformers loads and generates from, without fedvpa."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.alignment.policy import Policy
from fedvpa.errors import BadInputError


def export_merged(policy: Policy, z: Float[Tensor, "d"], folder: Path) -> None:
    """Write the base model with the adapter merged and z's effect made part of the embeddings. The policy is used up by it.

    Soft tokens become new special tokens which the chat template puts in front of every conversation and which are never
    generated; a shift is added to the embedding table (and the output layer, if it shared that table, keeps the old one).

    Raises:
        BadInputError: the directory is in use.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInputError(f"{folder}: not empty; choose another --out")
    conditioner, tokenizer = policy.model.conditioner, policy.tokenizer
    with torch.no_grad():
        extra = conditioner(z.unsqueeze(0).to(policy.device))[0]
        model: Any = policy.model.merge_and_unload()
        if conditioner.form == "shift":
            _shift_embeddings(model, extra)
        else:
            _add_soft_tokens(model, tokenizer, extra)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _add_soft_tokens(model: Any, tokenizer: Any, extra: Float[Tensor, "k h"]) -> None:
    names = [f"<|preference_{i}|>" for i in range(extra.shape[0])]
    tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
    ids = tokenizer.convert_tokens_to_ids(names)
    table = model.get_input_embeddings()
    if max(ids) >= table.num_embeddings:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    table = model.get_input_embeddings().weight
    table[ids] = extra.to(table.dtype)
    tokenizer.chat_template = "{{- '" + "".join(names) + "' -}}" + tokenizer.chat_template
    model.generation_config.suppress_tokens = ids


def _shift_embeddings(model: Any, extra: Float[Tensor, "1 h"]) -> None:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight.data_ptr() == table.weight.data_ptr():
        head.weight = torch.nn.Parameter(table.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    table.weight.add_(extra.to(table.weight.dtype))
