"""Settings of the server's stage; the command line is derived from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedvpa.config import Section, Seed


class TrainingConfig(Section):
    """The policy and its DPO."""

    base: str = Field(
        "smollm2", description="language model: smollm2, a folder, or hf:// and a Hub name"
    )
    thinking: bool = Field(
        False,
        description="let a reasoning model think before it answers; thoughts are never judged",
    )
    form: Literal["gate", "prefix", "shift"] = Field(
        "gate",
        description=(
            "z gates the adapter's ranks, is soft prefix tokens, or is added to input embeddings"
        ),
    )
    tokens: Annotated[int, Field(ge=1)] = Field(2, description="soft tokens, with form=prefix")
    max_prompt_tokens: Annotated[int, Field(ge=8)] = Field(
        256, description="longer prompts are left out"
    )
    epochs: Annotated[int, Field(ge=1)] = Field(
        1, description="passes over the pairs (feddpo: a client's, each time)"
    )
    batch: Annotated[int, Field(ge=1)] = Field(4, description="pairs per step")
    micro_batch: Annotated[int, Field(ge=1)] = Field(
        2, description="pairs of a step that are computed at once (bounds memory)"
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="of adapter and conditioner"
    )
    beta: Annotated[float, Field(gt=0)] = Field(0.1, description="DPO's beta")
    sft_weight: Annotated[float, Field(ge=0)] = Field(
        5.0, description="of the chosen response's mean log-likelihood, in the loss"
    )
    rank: Annotated[int, Field(ge=1)] = Field(16, description="LoRA rank (alpha is twice that)")
    gradient_checkpointing: bool = Field(False, description="less memory, more time")
    device: str = Field("cpu", description="torch device")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where it is native"
    )
    save_every: Annotated[int, Field(ge=1)] = Field(25, description="steps between checkpoints")
    seed: Seed = Field(0, description="all randomness follows from it")

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainingConfig:
        if self.batch % min(self.micro_batch, self.batch):
            raise ValueError(f"micro_batch {self.micro_batch} does not divide batch {self.batch}")
        return self


class AlignConfig(TrainingConfig):
    """Every setting of ``fedvpa align``."""

    limit: Annotated[int, Field(ge=0)] = Field(
        0, description="at most this many prompts, picked at random (0: all)"
    )
    candidates: Annotated[int, Field(ge=2)] = Field(
        8, description="responses sampled for a prompt and preference"
    )
    styles: str = Field(
        "",
        description=(
            "text file, a system prompt a line: the first candidates are drawn under each in turn"
        ),
    )
    users: Annotated[int, Field(ge=0)] = Field(
        0, description="beside the prototypes, z of this many random clients a prompt"
    )
    pairs_per_prompt: Annotated[int, Field(ge=1)] = Field(
        2, description="best and worst, second best and second worst, ..."
    )
    max_new_tokens: Annotated[int, Field(ge=4)] = Field(
        160, description="tokens of a response at most"
    )
    choose_from: Literal["all", "ended"] = Field(
        "all", description="ended: what the limit cut off is never chosen"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(0.7, description="of the candidates")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(0.95, description="of the candidates")
    sample_batch: Annotated[int, Field(ge=1)] = Field(
        64, description="responses drawn side by side"
    )
    margin: Annotated[float, Field(ge=0)] = Field(
        0.1, description="pairs whose rewards differ by less are dropped"
    )
    iterations: Annotated[int, Field(ge=1)] = Field(
        1, description="rounds of sampling from the policy and training it"
    )


class FedDPOConfig(TrainingConfig):
    """Every setting of ``fedvpa feddpo``."""

    rounds: Annotated[int, Field(ge=1)] = Field(4, description="rounds of federated averaging")
    cohort: Annotated[int, Field(ge=1)] = Field(4, description="clients per round, drawn at random")
    pairs: Annotated[int, Field(ge=1)] = Field(
        16, description="pairs of a client that are trained on, at most"
    )
    max_response_tokens: Annotated[int, Field(ge=4)] = Field(
        128, description="pairs with a longer response are left out"
    )
