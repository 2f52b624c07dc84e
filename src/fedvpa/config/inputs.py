"""Settings of what is read: comparisons, and the backbone that reads them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
Share = Annotated[float, Field(gt=0, lt=1)]
MADE = 40
"""Clients that are made where the data have no ids, and nobody says how many."""
FEDERATION = "federation"
"""The data source of pairs that the clients of a federation keep."""


class Section(BaseModel):
    """Frozen; unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PersonasConfig(Section):
    """The built-in generator, used when `data.source` is ``personas``."""

    groups: Annotated[int, Field(ge=1, le=10)] = Field(2, description="number of preference groups")
    pairs: Annotated[int, Field(ge=2)] = Field(30, description="comparisons per user")
    noise: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.05, description="share of labels that are flipped at random"
    )
    spread: NonNegative = Field(
        0.2, description="how far users scatter around their group's preference vector"
    )


class DataConfig(Section):
    """Which comparisons are read, and how they are divided among clients."""

    source: str = Field(
        "personas",
        description=(
            "comparisons: a file, a folder, a zip archive, hf:// and a Hub dataset, or 'personas'"
        ),
    )
    split: str | None = Field(
        None, description="read only files called SPLIT.* (a Hub dataset: its split)"
    )
    columns: dict[str, str] = Field(
        {}, description="fields under other names, as client_id=user_id (repeatable)"
    )
    score_margin: NonNegative = Field(
        0.0, description="rated responses make a pair where ratings differ by more than this"
    )
    on_bad_record: Literal["few", "error", "skip"] = Field(
        "few",
        description=(
            "few: skip and count records that compare nothing while under 1 % of a file, refuse the"
            " rest"
        ),
    )
    clients: Annotated[int, Field(ge=0)] = Field(
        0, description="number of clients (0: every client id; 40 where there are none)"
    )
    partition: Literal["auto", "natural", "group", "dirichlet", "mixed"] = Field(
        "auto", description="auto: natural where records have a client_id, else group"
    )
    group_ratio: str | None = Field(
        None, description="shares of clients per group (sorted names), as 70:30"
    )
    dirichlet_alpha: Annotated[float, Field(gt=0)] = Field(
        0.5, description="concentration of the Dirichlet distribution, with partition=dirichlet"
    )
    mixing: Annotated[float, Field(ge=0, le=1)] = Field(
        0.2, description="share of another group's pairs per client, with partition=mixed"
    )
    protocol: Literal["natural", "mirrored"] = Field(
        "natural",
        description=(
            "mirrored: half of the clients hold the reversed labels on the pairs of the other half"
        ),
    )
    content: Literal["new", "repeated"] = Field(
        "new",
        description=(
            "new: context and targets share no response (nor a prompt, where there are enough), in"
            " training, validation and evaluation"
        ),
    )
    corrupted: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of training clients whose labels are corrupted"
    )
    corruption: Literal["random", "reversed"] = Field(
        "random", description="kind of corruption: labels at random, or every label reversed"
    )
    max_pairs: Annotated[int, Field(ge=0)] = Field(
        0, description="largest number of pairs per client (0: no limit)"
    )
    validation_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of each client's pairs that is held out for validation"
    )
    public: str | None = Field(
        None,
        description=(
            "public pairs that the whitening is fitted to, their labels unread (default: the"
            " clients' sums)"
        ),
    )
    personas: PersonasConfig = PersonasConfig()

    @property
    def made(self) -> int:
        """Clients that are made where the data have no ids."""
        return self.clients or MADE


class FeaturesConfig(Section):
    """The frozen backbone and where its features are read."""

    backbone: str = Field(
        "smollm2",
        description="smollm2, smollm2-gguf, minilm, a folder, or hf://NAME (or NAME@REVISION)",
    )
    layer: Annotated[int, Field(ge=0)] = Field(
        18, description="residual stream after this block (0: the middle)"
    )
    pooling: Literal["last", "mean"] = Field(
        "mean", description="the response's last token, or the mean of all"
    )
    max_prompt_tokens: Positive = Field(
        512, description="longer prompts lose their oldest turns, then text of the oldest one left"
    )
    max_response_tokens: Annotated[int, Field(ge=2)] = Field(
        256, description="longer responses are cut from the right"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where it is native"
    )
    device: str = Field("cpu", description="torch device of the backbone")
    thinking: bool = Field(
        False, description="let a reasoning model's chat template open a thought (enable_thinking)"
    )
