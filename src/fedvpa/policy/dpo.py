"""Conditional DPO: TRL's trainer, given a z with every pair (DPO: Rafailov et al., 2023; loss,
reference log-probabilities, logging and checkpoints are TRL's)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from fedvpa.policy.conditioning import (
    CONDITIONER,
    PREFERENCE,
    PreferenceConditioner,
    attach,
    save_conditioner,
)

ENDED = ("chosen_ended", "rejected_ended")
"""Columns that say whether a response ended by itself (true where they are missing)."""


@dataclass
class PreferenceCollator(DataCollatorForPreference):
    """TRL's batch of chosen and, behind them, rejected sequences, with the z of each row.

    Of a response that a length limit ended, the end of the turn, which the chat template has added,
    is taken off again: the model never chose to stop there, and is not to learn that it did.
    `stops` are the tokens that end a turn.
    """

    stops: tuple[int, ...] = ()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad and stack."""
        batch: dict[str, Any] = super().torch_call(
            [self._open_ended(example) for example in examples]
        )
        z = torch.tensor([example[PREFERENCE] for example in examples], dtype=torch.float32)
        return batch | {PREFERENCE: torch.cat([z, z])}

    def _open_ended(self, example: dict[str, Any]) -> dict[str, Any]:
        cut = {}
        for ids, ended in zip(("chosen_ids", "rejected_ids"), ENDED):
            at = [i for i, token in enumerate(example[ids]) if token in self.stops]
            if at and not example.get(ended, True):
                cut[ids] = example[ids][: at[-1]]
        return example | cut


class ConditionalDPOTrainer(DPOTrainer):
    """DPO of pi(y | x, z) against the base model with z switched off.

    The dataset has a column `preference` (z, a list of floats), and may have `ENDED`, beside TRL's
    own. LoRA is asked for with TRL's `peft_config`; the conditioner is trained with it and saved
    beside the adapter in every checkpoint.
    """

    def __init__(self, *arguments: Any, conditioner: PreferenceConditioner, **given: Any) -> None:
        super().__init__(*arguments, **given)
        if not self.args.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs must be on: only that way is the reference read with z"
                " switched off"
            )
        attach(self.model, conditioner.to(self.accelerator.device))
        self.add_callback(_SaveConditioner(conditioner))

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's, without the preference: the reference is the base model itself."""
        return super().compute_ref_log_probs(
            model, {k: v for k, v in inputs.items() if k != PREFERENCE}
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [
            name for name in (PREFERENCE, *ENDED) if name not in self._signature_columns
        ]


class _SaveConditioner(TrainerCallback):
    """Writes the conditioner into every checkpoint that TRL has written."""

    def __init__(self, conditioner: PreferenceConditioner) -> None:
        self._conditioner = conditioner

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the checkpoint of a step."""
        save_conditioner(
            self._conditioner, Path(args.output_dir) / f"checkpoint-{state.global_step}"
        )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole."""
    whole = [p for p in folder.glob("checkpoint-*") if (p / CONDITIONER).is_file()]
    return max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
