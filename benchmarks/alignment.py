"""Tokens a second of conditional DPO beside TRL's own trainer, and of generation under z beside
`transformers.generate`.

    python -m benchmarks.alignment [--base smollm2] [--pairs 24] [--prompts 24] [--repeats 2]
    [--json FILE]

Both trainers get the same LoRA, the same pairs in the same order, and the same settings; what
differs is z. Pairs are persona responses. Runs alternate; a figure is the median over all steps
(training) or repeats (generation). Reference log-probabilities are computed before the clock
starts. Generation counts the tokens up to each response's end.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from fedvpa.config import PersonasConfig
from fedvpa.data.personas import personas, prompts
from fedvpa.features.loading import load_causal_model
from fedvpa.policy.conditioning import PREFERENCE, PreferenceConditioner, attach
from fedvpa.policy.dpo import ConditionalDPOTrainer, PreferenceCollator
from fedvpa.policy.policy import Policy, Sampling
from fedvpa.records import Message

RANK, BATCH = 16, 2


def main(argv: list[str] | None = None) -> int:
    """Print the speeds and their ratios."""
    parser = argparse.ArgumentParser(description="Tokens a second of training and generation.")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args(argv)
    disable_progress_bars()
    rows = _rows(arguments.pairs)
    training: dict[str, list[float]] = {"trl": [], "fedvpa": []}
    for _ in range(arguments.repeats):
        for name in training:
            training[name] += train(arguments.base, rows, conditioned=name == "fedvpa")
    generation: dict[str, list[float]] = {"transformers": [], "fedvpa": []}
    asked = [(Message("user", text),) for text in prompts("train")[: arguments.prompts]]
    policy, z = _policy(arguments.base)
    for seed in range(arguments.repeats):
        sampling = Sampling(arguments.max_new_tokens, 0.7, 0.95, len(asked))
        began = time.perf_counter()
        tokens = sum(
            b.tokens for b in policy.sample(asked, z.expand(len(asked), -1), sampling, seed)
        )
        generation["fedvpa"].append(tokens / (time.perf_counter() - began))
        generation["transformers"].append(generate_plainly(policy, asked, sampling, seed))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    results: dict[str, Any] = {
        "peak_gib": peak,
        "threads": torch.get_num_threads(),
        "training": {},
        "generation": {},
    }
    for kind, found in (("training", training), ("generation", generation)):
        middle = {name: statistics.median(values) for name, values in found.items()}
        other = next(name for name in middle if name != "fedvpa")
        results[kind] = middle | {"ratio": middle["fedvpa"] / middle[other], "all": found}
        print(
            f"{kind}: {other} {middle[other]:.0f}, fedvpa {middle['fedvpa']:.0f} tokens/s, ratio"
            f" {results[kind]['ratio']:.2f}"
        )
    print(f"peak memory {peak:.1f} GiB, {results['threads']} threads")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


def train(base: str, rows: list[dict[str, Any]], conditioned: bool) -> list[float]:
    """Tokens a second of every step but the first; all tokens of both sequences count."""
    loaded = load_causal_model(base, None, "cpu")
    speeds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            part = trainer.train_dataset.select(
                range((state.global_step - 1) * BATCH, state.global_step * BATCH)
            )
            length = sum(
                2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"])
                for r in part
            )
            speeds.append(length / (time.perf_counter() - self.began))

    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder, per_device_train_batch_size=BATCH, num_train_epochs=1,
            learning_rate=1e-3, report_to=[],
            precompute_ref_log_probs=True, disable_tqdm=True, use_cpu=True, bf16=False,
            save_strategy="no", logging_steps=1,
            gradient_checkpointing=False, max_length=None, train_sampling_strategy="sequential",
        )  # fmt: skip
        given: dict[str, Any] = {
            "model": loaded.module, "args": settings, "processing_class": loaded.tokenizer,
            "train_dataset": Dataset.from_list(rows),
            "peft_config": _lora(),
        }  # fmt: skip
        trainer: Any
        if conditioned:
            collator = PreferenceCollator(pad_token_id=loaded.tokenizer.pad_token_id)
            trainer = ConditionalDPOTrainer(
                **given, data_collator=collator, conditioner=_conditioner()
            )
        else:
            given["train_dataset"] = given["train_dataset"].remove_columns(PREFERENCE)
            trainer = DPOTrainer(**given)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Clock())
        trainer.train()
    return speeds[1:]


def generate_plainly(
    policy: Policy, asked: list[tuple[Message, ...]], sampling: Sampling, seed: int
) -> float:
    """Tokens a second of Transformers' own sampling from the base model, left-padded in one
    batch."""
    tokenizer = policy.tokenizer
    turns = [[{"role": m.role, "content": m.content} for m in prompt] for prompt in asked]
    inputs = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True,
        tokenizer_kwargs={"padding_side": "left"},
    )  # fmt: skip
    torch.manual_seed(seed)
    began = time.perf_counter()
    with policy.model.disable_adapter(), torch.inference_mode():
        tokens = policy.model.generate(
            **inputs, do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p,
            top_k=0,
            max_new_tokens=sampling.max_new_tokens, eos_token_id=policy.stops,
            pad_token_id=tokenizer.pad_token_id,
        )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
    took = time.perf_counter() - began
    stop = torch.isin(tokens, torch.tensor(policy.stops))
    return (int((stop.cumsum(-1) == 0).sum()) + int(stop.any(-1).sum())) / took


def _rows(count: int) -> list[dict[str, Any]]:
    [client] = personas(PersonasConfig(pairs=count), [0], 0)
    return [
        {
            "prompt": [{"role": m.role, "content": m.content} for m in pair.prompt],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
            PREFERENCE: [1.0 if i % 2 else -1.0, 0.0],
        }
        for i, pair in enumerate(client.pairs)
    ]


def _lora() -> LoraConfig:
    return LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _conditioner() -> PreferenceConditioner:
    return PreferenceConditioner.gates(
        torch.zeros(2), 1.0, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), RANK
    )


def _policy(base: str) -> tuple[Policy, torch.Tensor]:
    loaded = load_causal_model(base, None, "cpu")
    model: Any = get_peft_model(loaded.module, _lora())
    attach(model, _conditioner())
    return Policy(model.eval(), loaded.tokenizer), torch.tensor([1.0, 0.0])


if __name__ == "__main__":
    sys.exit(main())
