"""Training of a policy with conditional DPO, the part that `fedvpa align` and `fedvpa feddpo`
share."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedvpa.features.loading import LoadedModel, dtype_of, load_causal_model
from fedvpa.policy.card import PolicyCard, save_card
from fedvpa.policy.conditioning import load_conditioner, save_conditioner
from fedvpa.policy.dpo import ConditionalDPOTrainer, PreferenceCollator, last_checkpoint
from fedvpa.policy.policy import Policy, new_conditioner
from fedvpa.policy.settings import TrainingConfig

OnStage = Callable[[str, int, int, str], None]
"""Called with (stage, done, in all, a note)."""


def load_base(config: TrainingConfig) -> LoadedModel:
    """A fresh copy of the base model.

    Raises:
        BadInputError: it cannot be had.
    """
    return load_causal_model(config.base, dtype_of(config.dtype, config.device), config.device)


def by_prompt(pairs: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Pairs of a prompt side by side, prompts at random: in a batch that holds a prompt's opposite
    preferences, what they have in common cancels, and what z has to decide is left."""
    together: dict[str, list[dict[str, Any]]] = {}
    for pair in pairs:
        together.setdefault(json.dumps(pair["prompt"]), []).append(pair)
    order = list(together.values())
    random.Random(seed).shuffle(order)
    return [pair for own in order for pair in own]


def train_dpo(
    loaded: LoadedModel, card: PolicyCard, pairs: list[dict[str, Any]], config: TrainingConfig,
    previous: Path | None,
    place: Path, stage: str, report: OnStage,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """DPO on rows of TRL's with their z, in this order, from the weights in `previous`, against the
    base model.

    The weights end up in `place/trained`; checkpoints in `place` let an interrupted training go on.
    Returns the PEFT model and figures. The model in `loaded` becomes part of it.
    """
    from datasets import Dataset, disable_progress_bars, load_from_disk
    from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
    from transformers import PrinterCallback

    disable_progress_bars()  # progress is reported by stage
    saved = place / "pairs"
    if not (saved / "dataset_info.json").is_file():
        told = {"chat_template_kwargs": {"enable_thinking": config.thinking}}
        Dataset.from_list([pair | told for pair in pairs]).save_to_disk(str(saved))
    conditioner = new_conditioner(
        card, loaded.module, loaded.tokenizer, config.rank, config.tokens, config.seed
    )
    if loaded.tokenizer.pad_token_id is None:
        loaded.tokenizer.pad_token = loaded.tokenizer.eos_token
    arguments = _dpo_arguments(config, place)
    stops = tuple(Policy(loaded.module, loaded.tokenizer).stops)
    trainer = ConditionalDPOTrainer(
        model=loaded.module, args=arguments, processing_class=loaded.tokenizer,
        train_dataset=load_from_disk(str(saved)),
        data_collator=PreferenceCollator(pad_token_id=loaded.tokenizer.pad_token_id, stops=stops),
        peft_config=LoraConfig(r=config.rank, lora_alpha=2 * config.rank, lora_dropout=0.0,
        target_modules="all-linear",
                               task_type="CAUSAL_LM"),
        conditioner=conditioner,
    )  # fmt: skip
    if previous is not None:
        set_peft_model_state_dict(trainer.model, load_peft_weights(str(previous / "adapter")))
        load_conditioner(conditioner, previous)

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_telling(stage, report))
    found = last_checkpoint(place / "checkpoints")
    if found is not None:
        load_conditioner(conditioner, found)
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    trained = place / "trained"
    trained.mkdir(exist_ok=True)
    trainer.model.save_pretrained(str(trained / "adapter"), selected_adapters=["default"])
    save_conditioner(conditioner, trained)
    figures = _figures(trainer.state, time.perf_counter() - began)
    return trainer.model, figures


def _dpo_arguments(config: TrainingConfig, place: Path) -> Any:
    """TRL's arguments of these settings."""
    from trl.trainer.dpo_config import DPOConfig

    micro = min(config.micro_batch, config.batch)
    weighted = config.sft_weight > 0
    return DPOConfig(
        output_dir=str(place / "checkpoints"), num_train_epochs=config.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.batch // micro,
        loss_type=["sigmoid", "sft"] if weighted else ["sigmoid"], loss_weights=[1.0,
        config.sft_weight] if weighted else None,
        learning_rate=config.learning_rate, lr_scheduler_type="cosine", warmup_steps=0.1,
        beta=config.beta, seed=config.seed,
        precompute_ref_log_probs=True, gradient_checkpointing=config.gradient_checkpointing,
        max_length=None,
        save_strategy="steps", save_steps=config.save_every, save_total_limit=2, logging_steps=1,
        report_to=[],
        disable_tqdm=True, use_cpu=config.device == "cpu", bf16=False,
        train_sampling_strategy="sequential",
    )  # fmt: skip


def _telling(stage: str, report: OnStage) -> Any:
    """Passes TRL's log on."""
    from transformers import TrainerCallback

    class Tell(TrainerCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
        ) -> None:
            if logs and "loss" in logs:
                note = (
                    f"loss {float(logs['loss']):.3f}, accuracy"
                    f" {float(logs.get('rewards/accuracies', 0)):.2f}"
                )
                report(stage, state.global_step, state.max_steps, note)

    return Tell()


def _figures(state: Any, seconds: float) -> dict[str, Any]:
    """Loss and accuracy over the last fifth of the steps."""
    log = [row for row in state.log_history if "loss" in row]
    last = log[-max(1, len(log) // 5) :]
    return {
        "steps": state.global_step, "training_seconds": seconds,
        "loss": sum(float(r["loss"]) for r in last) / len(last),
        "preference_accuracy": sum(float(r["rewards/accuracies"]) for r in last) / len(last),
    }  # fmt: skip


def publish(trained: Path, card: PolicyCard, root: Path) -> None:
    """Make a policy of what `train_dpo` left in `trained`. The card comes last: it marks the
    policy as whole."""
    shutil.copytree(trained / "adapter", root / "adapter", dirs_exist_ok=True)
    shutil.copy(trained / "conditioner.safetensors", root / "conditioner.safetensors")
    save_card(card, root)
