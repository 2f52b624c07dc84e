"""Every setting: name, type, default and help, once. YAML files and flags are derived from this.

`BASIC` are those that ``--help`` shows; ``--help-all`` shows the rest too.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fedvpa.errors import BadInputError
from fedvpa.methods import Method, method
from fedvpa.parts import AGGREGATORS, HEADS, PRIORS, Known

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
PriorName = Annotated[str, AfterValidator(Known("prior", PRIORS))]
HeadName = Annotated[str, AfterValidator(Known("reward head", HEADS))]
AggregatorName = Annotated[str, AfterValidator(Known("aggregator", AGGREGATORS))]
FEDERATION = "federation"
"""The data source of pairs that the clients of a federation keep."""

BASIC = (
    "method", "seed", "out", "data.source", "data.split", "data.clients", "data.partition",
    "data.personas.groups", "data.personas.pairs", "features.backbone", "features.layer",
    "features.device", "model.inputs", "model.latent", "model.conditioning", "prior.kind",
    "prototypes.kind", "prototypes.modes", "federation.rounds", "federation.cohort",
    "federation.local_steps", "federation.learning_rate", "federation.aggregation",
    "privacy.enabled", "privacy.noise", "privacy.clip",
)  # fmt: skip


def _method_name(name: str) -> str:
    try:
        method(name)
    except BadInputError as error:
        raise ValueError(str(error)) from error
    return name


class Section(BaseModel):
    """Frozen; unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PersonasConfig(Section):
    """The built-in generator, used when `data.source` is ``personas``."""

    groups: Annotated[int, Field(ge=1, le=10)] = Field(
        2, description="number of preference groups M"
    )
    pairs: Annotated[int, Field(ge=2)] = Field(30, description="comparisons a user")
    noise: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.05, description="share of labels flipped"
    )
    spread: NonNegative = Field(
        0.2, description="how far users scatter around their group's preference vector"
    )


class DataConfig(Section):
    """Which comparisons are read, and how they are divided among clients."""

    source: str = Field(
        "personas", description="file, folder, Hub dataset, or the built-in 'personas'"
    )
    split: str | None = Field(None, description="only files called SPLIT.* (a Hub dataset's split)")
    on_bad_record: Literal["few", "error", "skip"] = Field(
        "few",
        description=(
            "few: skip and count records that compare nothing while under 1 % of a file, refuse the"
            " rest"
        ),
    )
    clients: Positive = Field(40, description="number of clients")
    partition: Literal["auto", "natural", "group", "dirichlet", "mixed"] = Field(
        "auto", description="auto: natural where records have a client_id, else group"
    )
    group_ratio: str | None = Field(
        None, description="shares of clients per group (sorted names), as 70:30"
    )
    dirichlet_alpha: Annotated[float, Field(gt=0)] = Field(
        0.5, description="concentration, with partition=dirichlet"
    )
    mixing: Annotated[float, Field(ge=0, le=1)] = Field(
        0.2, description="share of foreign pairs, with partition=mixed"
    )
    protocol: Literal["natural", "mirrored"] = Field(
        "natural",
        description=(
            "mirrored: half of the clients hold the reversed labels on the pairs of the other half"
        ),
    )
    corrupted: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of training clients with spoilt labels"
    )
    corruption: Literal["random", "reversed"] = Field("random", description="how they are spoilt")
    max_pairs: Annotated[int, Field(ge=0)] = Field(
        0, description="at most this many pairs a client (0: all)"
    )
    validation_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="of each client's pairs, held out"
    )
    public: str | None = Field(
        None,
        description=(
            "public pairs that the whitening is fitted to, their labels unread (default: the"
            " clients' sums)"
        ),
    )
    personas: PersonasConfig = PersonasConfig()


class FeaturesConfig(Section):
    """The frozen backbone and where its features are read."""

    backbone: str = Field(
        "smollm2", description="smollm2, smollm2-gguf, minilm, a Hugging Face name, or a folder"
    )
    layer: Annotated[int, Field(ge=0)] = Field(
        18, description="residual stream after this block (0: the middle)"
    )
    pooling: Literal["last", "mean"] = Field(
        "mean", description="the response's last token, or the mean of all"
    )
    max_prompt_tokens: Positive = Field(512, description="longer prompts are cut from the left")
    max_response_tokens: Annotated[int, Field(ge=2)] = Field(
        256, description="longer responses are cut from the right"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where it is native"
    )
    device: str = Field("cpu", description="torch device that runs the backbone")


class ModelConfig(Section):
    """The variational selector (M1, M2)."""

    inputs: Positive = Field(32, description="whitened dimensions of the features")
    latent: Positive = Field(16, description="dimensions d of z")
    encoder_hidden: tuple[Positive, ...] = Field(
        (), description="widths of the encoder's hidden tanh layers (none: linear)"
    )
    odd_mean: bool = Field(
        True, description="swap guidance by construction: reversed labels reverse the mean"
    )
    pooling: Literal["mean", "attention", "poe"] = Field(
        "mean", description="how a context's pairs are pooled"
    )
    shrinkage: NonNegative = Field(
        4.0, description="with pooling=mean: as many pairs' worth of pull towards z = 0"
    )
    conditioning: HeadName = Field("bilinear", description="reward head: how z steers r")
    rank: Annotated[int, Field(ge=0)] = Field(0, description="rank of the bilinear form (0: full)")
    reward_hidden: Positive = Field(64, description="hidden units of an MLP reward")
    decoder_scale: Annotated[float, Field(gt=0)] = Field(
        0.15, description="initial scale of z's effect on the reward"
    )


class PriorConfig(Section):
    """The prior of the latent preference in training (M3-M5)."""

    kind: PriorName = Field(
        "gaussian",
        description=(
            "N(0, I); the mixture of peers' posteriors; or of components that are fitted, as the"
            " anchors are, from sums over clients alone, so that nobody sees an individual's latent"
        ),
    )
    weights: Literal["gumbel", "uniform", "sample-size"] = Field(
        "gumbel", description="weights of the mixture (M4)"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Gumbel-Softmax temperature"
    )
    estimator: Literal["monte-carlo", "hershey-olsen"] = Field(
        "monte-carlo", description="KL to the mixture (M5)"
    )
    exclude_self: bool = Field(True, description="leave a client's own posterior out of its prior")
    max_components: Annotated[int, Field(ge=1)] = Field(
        128, description="at most this many peers in the mixture"
    )
    start_round: Annotated[int, Field(ge=0)] = Field(0, description="N(0, I) before this round")
    members: Literal["known", "last-round"] = Field(
        "known", description="peers: all that were ever seen, or the last cohort"
    )


class PrototypesConfig(Section):
    """Prototypes of the preference modes (M6)."""

    modes: int | Literal["auto"] = Field(
        "auto", description="modes M; auto: by withheld choices (anchored), else silhouette"
    )
    kind: Literal["none", "learned", "fixed", "anchored"] = Field(
        "none",
        description=(
            "learned/fixed: orthogonal, at the radius; anchored: fitted to the clients once, then"
            " frozen"
        ),
    )
    radius: Annotated[float, Field(gt=0)] = Field(
        5.0, description="radius s of orthogonal prototypes"
    )
    start_round: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description=(
            "no pull before this round; anchors are fitted then; auto: 2/5 of the rounds"
            " (orthogonal: 0)"
        ),
    )


class ObjectiveConfig(Section):
    """Weights of the local objective (M7)."""

    kl_weight: NonNegative = Field(0.002, description="beta")
    kl_schedule: Literal["constant", "linear", "cyclical"] = Field(
        "constant", description="warm-up of beta"
    )
    kl_warmup_rounds: Positive = Field(10, description="length of the warm-up, or of one cycle")
    free_bits: NonNegative = Field(0.0, description="nats per latent dimension that cost nothing")
    pull_weight: NonNegative = Field(1.0, description="lambda")
    orthonormal_weight: NonNegative = Field(0.1, description="gamma")
    reward_decay: NonNegative = Field(
        0.0, description="L2 penalty on the bilinear reward's direction under z"
    )
    samples: Positive = Field(1, description="latent samples a step")


class FederationConfig(Section):
    """Rounds, cohorts, local training and aggregation (M8)."""

    rounds: Positive = Field(50, description="communication rounds")
    cohort: Annotated[int, Field(ge=0)] = Field(40, description="clients a round (0: all)")
    local_steps: Positive = Field(30, description="steps a client and round")
    batch_size: Annotated[int, Field(ge=0)] = Field(
        0, description="pairs a step (0: all of the client's)"
    )
    context_share: Share = Field(
        0.7, description="of a step's pairs, read as context; the rest are targets"
    )
    protocol: Literal["disjoint", "single-pair"] = Field(
        "disjoint", description="single-pair LEAKS: z is inferred from the very pair that is scored"
    )
    optimiser: Literal["adam", "sgd"] = Field("adam", description="the clients' optimiser")
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        0.003, description="the clients' step size"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="with optimiser=sgd")
    weight_decay: NonNegative = Field(0.0, description="L2 penalty in the clients' optimiser")
    aggregation: Literal["uniform", "samples"] = Field("uniform", description="weights of FedAvg")
    aggregator: AggregatorName = Field(
        "mean",
        description=(
            "how clients' updates are brought together; all but mean withstand some attackers"
        ),
    )
    trim: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.2, description="share of attackers that these withstand"
    )
    max_norm: NonNegative = Field(
        0.0, description="longer updates are shortened to this L2 norm (0: they are not)"
    )
    server_optimiser: Literal["average", "momentum", "adam"] = Field(
        "average", description="FedAvg, FedAvgM, FedAdam"
    )
    server_learning_rate: Annotated[float, Field(gt=0)] = Field(
        1.0, description="the server's step size"
    )
    posterior_from: Literal["broadcast", "local"] = Field(
        "broadcast",
        description="a client's posterior: under the round's shared model, or after its own steps",
    )
    selectors: Annotated[int, Field(ge=2)] = Field(
        3, description="fedbiscuit: number of selectors U"
    )
    regroup_every: Positive = Field(
        5, description="fedbiscuit: rounds between choices of a selector"
    )
    finetune_steps: Positive = Field(
        10, description="fedavg-btl+finetune: local steps on a user's context"
    )
    backend: Literal["vectorised", "sequential"] = Field(
        "vectorised", description="sequential: readable, names faults"
    )
    chunk: Annotated[int, Field(ge=0)] = Field(
        0, description="clients trained side by side (0: what fits the cache)"
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        0, description="threads, one chunk each (0: one a core)"
    )
    checkpoint_every: Positive = Field(5, description="rounds between checkpoints")
    validate_every: Positive = Field(5, description="rounds between validations")


class InferenceConfig(Section):
    """How a user's z is inferred from a context."""

    kind: Literal["amortised", "population"] = Field(
        "amortised",
        description="the encoder's mean, or Bayes over the population's fitted components",
    )
    latent_evidence: NonNegative = Field(
        0.1,
        description=(
            "power of the encoder's density beside the likelihood of the choices, in that rule"
        ),
    )


class PrivacyConfig(Section):
    """Client-level differential privacy of all that the server releases."""

    enabled: bool = Field(
        False, description="clip what a client contributes, noise the sums, account for epsilon"
    )
    noise: NonNegative = Field(
        1.0, description="of a round, in multiples of the bounds; see `fedvpa privacy plan`"
    )
    clip: Annotated[float, Field(gt=0)] = Field(1.0, description="L2 bound of a client's update")
    fit_noise: NonNegative = Field(
        40.0, description="of every sum from which components are fitted"
    )
    latent_clip: Annotated[float, Field(gt=0)] = Field(
        2.0, description="L2 bound of a client's latent mean, in these sums"
    )
    variance_clip: Annotated[float, Field(gt=0)] = Field(
        4.0, description="L2 bound of its posterior variance, in these sums"
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="delta, well under one over the number of clients"
    )
    budget: NonNegative = Field(
        0.0, description="training stops before epsilon exceeds this (0: it does not)"
    )


MethodName = Annotated[str, AfterValidator(_method_name)]


class Config(Section):
    """Everything a run depends on."""

    method: MethodName = Field("fedvpa-gp", description="what is trained")
    preset: Literal["default", "paper"] = Field(
        "default", description="paper: the published configuration"
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="all randomness follows from it")
    out: str = Field("runs/default", description="directory of the run")
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = Field(
        "none", description="where curves are logged too"
    )
    data: DataConfig = DataConfig()
    features: FeaturesConfig = FeaturesConfig()
    model: ModelConfig = ModelConfig()
    prior: PriorConfig = PriorConfig()
    prototypes: PrototypesConfig = PrototypesConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    federation: FederationConfig = FederationConfig()
    inference: InferenceConfig = InferenceConfig()
    privacy: PrivacyConfig = PrivacyConfig()

    @property
    def prototypes_start(self) -> int:
        """Round from which prototypes act."""
        if self.prototypes.start_round != "auto":
            return self.prototypes.start_round
        return max(1, 2 * self.federation.rounds // 5) if self.prototypes.kind == "anchored" else 0

    @property
    def variational(self) -> bool:
        """Whether the method infers a latent preference."""
        return self.entry.latent

    @property
    def entry(self) -> Method:
        """What the method is."""
        return method(self.method)
