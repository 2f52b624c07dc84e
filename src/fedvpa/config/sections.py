"""Every setting: name, type, default and help, once. YAML files and flags are derived from this."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fedvpa.config.inputs import (
    DataConfig,
    FeaturesConfig,
    NonNegative,
    Positive,
    Section,
    Seed,
    Share,
)
from fedvpa.errors import BadInputError
from fedvpa.methods import DEFAULT, Method, entry_of, method
from fedvpa.parts import AGGREGATORS, HEADS, PRIORS, Known

PriorName = Annotated[str, AfterValidator(Known("prior", PRIORS))]
HeadName = Annotated[str, AfterValidator(Known("reward head", HEADS))]
AggregatorName = Annotated[str, AfterValidator(Known("aggregator", AGGREGATORS))]


def _method_name(name: str) -> str:
    try:
        method(name)
    except BadInputError as error:
        raise ValueError(str(error)) from error
    return name


class ModelConfig(Section):
    """The variational selector (M1, M2)."""

    inputs: Annotated[int, Field(gt=0, le=65_536)] = Field(
        32, description="dimensions p of the whitened features"
    )
    scaling: Literal["white", "principal"] = Field(
        "white",
        description=(
            "scale of the inputs: each of unit variance; or principal components on one common"
            " scale, the first of unit variance"
        ),
    )
    latent: Annotated[int, Field(gt=0, le=4096)] = Field(
        16, description="dimensions d of the latent preference z"
    )
    encoder_hidden: tuple[Annotated[int, Field(gt=0, le=65_536)], ...] = Field(
        (), description="widths of the encoder's hidden tanh layers (none: linear)"
    )
    odd_mean: bool = Field(
        True, description="swap guidance by construction: reversed labels reverse the mean"
    )
    pooling: Literal["mean", "attention", "poe"] = Field(
        "mean", description="how the pairs of a context are pooled into one posterior"
    )
    shrinkage: NonNegative = Field(
        4.0, description="with pooling=mean: the mean over n pairs is scaled by n / (n + shrinkage)"
    )
    conditioning: HeadName = Field("bilinear", description="reward head: how z steers the reward")
    rank: Annotated[int, Field(ge=0)] = Field(0, description="rank of the bilinear form (0: full)")
    reward_hidden: Positive = Field(64, description="hidden units of an MLP reward")
    decoder_scale: Annotated[float, Field(gt=0)] = Field(
        0.15, description="initial scale of the effect of z on the reward"
    )

    @property
    def white(self) -> bool:
        """Whether every input has unit variance."""
        return self.scaling == "white"


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
        "gumbel",
        description="weights of the components (M4): learned, equal, or by number of pairs",
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Gumbel-Softmax temperature"
    )
    estimator: Literal["monte-carlo", "hershey-olsen"] = Field(
        "monte-carlo", description="estimator of the KL divergence to the mixture (M5)"
    )
    exclude_self: bool = Field(
        True, description="leave a client's own posterior out of its mixture prior"
    )
    max_components: Annotated[int, Field(ge=1)] = Field(
        128, description="largest number of peers in the mixture"
    )
    start_round: Annotated[int, Field(ge=0)] = Field(
        0, description="first round with the mixture; N(0, I) before"
    )
    members: Literal["known", "last-round"] = Field(
        "known",
        description="peers in the mixture: all clients that ever took part, or the last cohort",
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

    kl_weight: NonNegative = Field(0.002, description="weight beta of the KL divergence")
    kl_schedule: Literal["constant", "linear", "cyclical"] = Field(
        "constant", description="schedule of beta over rounds"
    )
    kl_warmup_rounds: Positive = Field(
        10, description="rounds of the warm-up of beta, or of one cycle"
    )
    free_bits: NonNegative = Field(
        0.0, description="KL divergence per latent dimension, in nats, that costs nothing"
    )
    pull_weight: NonNegative = Field(
        1.0, description="weight lambda of the pull towards prototypes"
    )
    orthonormal_weight: NonNegative = Field(
        0.1, description="weight gamma of the orthonormality of prototypes"
    )
    reward_decay: NonNegative = Field(
        0.0, description="L2 penalty on the direction of the reward under z"
    )
    samples: Annotated[int, Field(gt=0, le=1024)] = Field(
        1, description="samples of z per local step"
    )


class FederationConfig(Section):
    """Rounds, cohorts, local training and aggregation (M8)."""

    rounds: Annotated[int, Field(gt=0, le=1_000_000)] = Field(
        50, description="communication rounds"
    )
    cohort: Annotated[int, Field(ge=0)] = Field(40, description="clients per round (0: all)")
    local_steps: Annotated[int, Field(gt=0, le=10_000)] = Field(
        30, description="local optimiser steps per client per round"
    )
    batch_size: Annotated[int, Field(ge=0)] = Field(
        0, description="pairs per local step (0: all pairs of the client)"
    )
    context_share: Share = Field(
        0.7, description="share of a step's pairs that is context; the other pairs are targets"
    )
    protocol: Literal["disjoint", "single-pair"] = Field(
        "disjoint",
        description=(
            "disjoint: context and targets share no pair; single-pair LEAKS: z is inferred from the"
            " scored pair"
        ),
    )
    optimiser: Literal["adam", "sgd"] = Field("adam", description="optimiser of the local steps")
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        0.003, description="learning rate of the local steps"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="momentum of the local steps, with optimiser=sgd"
    )
    weight_decay: NonNegative = Field(0.0, description="weight decay of the local steps")
    aggregation: Literal["uniform", "samples"] = Field(
        "uniform", description="weights of clients in the mean: equal, or by number of pairs"
    )
    aggregator: AggregatorName = Field(
        "mean",
        description=("how the clients' updates become one; all but mean withstand some attackers"),
    )
    trim: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.2, description="share of attackers that trimmed-mean and krum withstand"
    )
    max_norm: NonNegative = Field(
        0.0, description="L2 norm that updates are clipped to (0: no clipping)"
    )
    server_optimiser: Literal["average", "momentum", "adam"] = Field(
        "average", description="FedAvg, FedAvgM, FedAdam"
    )
    server_learning_rate: Annotated[float, Field(gt=0)] = Field(
        1.0, description="learning rate of the server optimiser"
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
        "vectorised", description="sequential: one client after the other, checked after every step"
    )
    chunk: Annotated[int, Field(ge=0)] = Field(
        0, description="clients trained side by side (0: as many as fit the processor cache)"
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        0, description="threads, each with a chunk of clients (0: one per core)"
    )
    checkpoint_every: Positive = Field(5, description="rounds between checkpoints")
    validate_every: Positive = Field(5, description="rounds between validations")


class PopulationConfig(Section):
    """The federated mixture prior of `fedvpa-gp`, and how it is searched (M9)."""

    structure: Literal["auto", "directions", "groups"] = Field(
        "auto",
        description=(
            "directions: one wide component, for people who differ by degree; groups: narrow ones;"
            " auto: by held-out contents"
        ),
    )
    order: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = Field(
        "auto", description="number of directions, or of groups"
    )
    ridge: NonNegative | Literal["auto"] = Field(
        "auto", description="L2 penalty on the reward, per pair, in units of the first input"
    )
    width: Annotated[float, Field(ge=0, le=10)] | Literal["auto"] = Field(
        "auto", description="factor on the effect of z (0: everybody is alike)"
    )
    folds: Annotated[int, Field(ge=2, le=20)] = Field(
        3, description="parts of the contents, by which all this is chosen"
    )
    search: Annotated[float, Field(gt=0, le=1)] = Field(
        0.4, description="share of the rounds after which only the best structures go on"
    )
    splits: Annotated[int, Field(ge=1, le=100)] = Field(
        2, description="divisions of a client's pairs into context and targets per round"
    )
    samples: Annotated[int, Field(ge=0, le=100)] = Field(
        0, description="samples of z per division (0: the closed-form prediction)"
    )
    radius: Annotated[float, Field(gt=0)] = Field(
        1.5, description="radius of the groups' orthogonal centres"
    )
    spread: Annotated[float, Field(gt=0)] = Field(0.14, description="standard deviation of a group")


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
        False,
        description="clip every client's contribution, add noise to the sums, account for epsilon",
    )
    noise: NonNegative = Field(
        1.0, description="noise multiplier of a round, over the bounds; see `fedvpa privacy plan`"
    )
    clip: Annotated[float, Field(gt=0)] = Field(1.0, description="L2 bound of a client's update")
    fit_noise: NonNegative = Field(
        40.0,
        description="noise multiplier of every sum from which components are fitted or a width is"
        " chosen",
    )
    latent_clip: Annotated[float, Field(gt=0)] = Field(
        2.0, description="L2 bound of a client's posterior mean, in these sums"
    )
    variance_clip: Annotated[float, Field(gt=0)] = Field(
        4.0, description="L2 bound of a client's posterior variance, in these sums"
    )
    gain_clip: Annotated[float, Field(gt=0)] = Field(
        0.5, description="L2 bound of what a client gains by each width of the prior, nats per pair"
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="delta of (epsilon, delta); well under one over the number of clients"
    )
    budget: NonNegative = Field(
        0.0, description="largest epsilon: training stops before it is exceeded (0: no limit)"
    )


MethodName = Annotated[str, AfterValidator(_method_name)]


class Config(Section):
    """Everything a run depends on."""

    method: MethodName = Field(DEFAULT, description="method to train")
    preset: Literal["default", "paper"] = Field(
        "default", description="paper: the published configuration"
    )
    seed: Seed = Field(0, description="seed of all randomness")
    out: str = Field("runs/default", description="folder of the run")
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = Field(
        "none", description="where curves are logged as well"
    )
    data: DataConfig = DataConfig()
    features: FeaturesConfig = FeaturesConfig()
    model: ModelConfig = ModelConfig()
    prior: PriorConfig = PriorConfig()
    prototypes: PrototypesConfig = PrototypesConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    federation: FederationConfig = FederationConfig()
    inference: InferenceConfig = InferenceConfig()
    population: PopulationConfig = PopulationConfig()
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
        """What the method is, under the preset."""
        return entry_of(self.method, self.preset)
