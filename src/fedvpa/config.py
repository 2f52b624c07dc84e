"""Every setting, once: names, types, defaults and help. YAML files and the command line are derived
from this.

Settings are layered: built-in defaults < preset < method < YAML file < flags. Unknown names are
errors, and so is a setting that nothing would read. Its main switches are printed, and all of the
effective configuration is saved in the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedvpa.errors import BadInputError

Method = Literal[
    "fedvpa-gp", "fedvpl", "fedvpl+mix", "fedvpl+ortho", "fedavg-btl", "fedavg-btl-mlp",
    "fedavg-btl+finetune",
    "fedbiscuit", "local", "centralised-vpl", "oracle-group", "oracle-bayes",
]  # fmt: skip
METHODS: tuple[str, ...] = get_args(Method)
FEDERATION = "federation"
"""Stands for a source of data that the clients of a federation keep."""
VARIATIONAL: tuple[str, ...] = (
    "fedvpa-gp",
    "fedvpl",
    "fedvpl+mix",
    "fedvpl+ortho",
    "centralised-vpl",
)

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


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
    conditioning: Literal["bilinear", "concat", "film", "additive"] = Field(
        "bilinear", description="how z steers r"
    )
    rank: Annotated[int, Field(ge=0)] = Field(0, description="rank of the bilinear form (0: full)")
    reward_hidden: Positive = Field(64, description="hidden units of an MLP reward")
    decoder_scale: Annotated[float, Field(gt=0)] = Field(
        0.15, description="initial scale of z's effect on the reward"
    )


class PriorConfig(Section):
    """The prior of the latent preference in training (M3-M5)."""

    kind: Literal["gaussian", "peers", "components"] = Field(
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
    aggregator: Literal["mean", "trimmed-mean", "median", "krum"] = Field(
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


class Config(Section):
    """Everything a run depends on."""

    method: Method = Field("fedvpa-gp", description="what is trained")
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
        return self.method in VARIATIONAL


_MIX: dict[str, Any] = {"inference": {"kind": "population"}}
_ORTHO: dict[str, Any] = {"prototypes": {"kind": "anchored"}, "objective": {"pull_weight": 0.01}}
_GP: dict[str, Any] = _MIX | {
    "prototypes": {"kind": "anchored"},
    "objective": {"pull_weight": 0.01, "reward_decay": 0.03},
}
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "fedvpl+mix": _MIX,
    "fedvpl+ortho": _ORTHO,
    "fedvpa-gp": _GP,
}

_PAPER: dict[str, Any] = {
    "model": {"latent": 32, "encoder_hidden": (512, 256, 128), "odd_mean": False, "shrinkage": 0.0,
    "conditioning": "additive"},
    "objective": {"kl_weight": 0.1, "pull_weight": 1.0, "orthonormal_weight": 0.1},
    "federation": {
        "cohort": 10, "batch_size": 8, "protocol": "single-pair", "posterior_from": "local",
        "learning_rate": 0.001,
    },
}  # fmt: skip
_PAPER_MIX = {"prior": {"kind": "peers", "weights": "gumbel", "members": "last-round"}}
_PAPER_ORTHO = {"prototypes": {"kind": "learned", "modes": 2}}
PAPER_METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "fedvpl+mix": _PAPER_MIX, "fedvpl+ortho": _PAPER_ORTHO, "fedvpa-gp": _PAPER_MIX | _PAPER_ORTHO,
}  # fmt: skip


def build_config(*layers: Mapping[str, Any]) -> Config:
    """Merge explicit settings (later wins) over the defaults of their preset and method, and check
    the result.

    Raises:
        BadInputError: an unknown name, a bad value, or a setting that nothing would read.
    """
    explicit: dict[str, Any] = {}
    for layer in layers:
        explicit = merged(explicit, layer)
    method, preset = explicit.get("method", "fedvpa-gp"), explicit.get("preset", "default")
    base: dict[str, Any] = {}
    if preset == "paper":
        base = merged(_PAPER, PAPER_METHOD_SETTINGS.get(method, {}))
    elif preset == "default":
        base = METHOD_SETTINGS.get(method, {})
    try:
        config = Config.model_validate(merged(base, explicit))
    except ValidationError as error:
        raise BadInputError("; ".join(explain(e) for e in error.errors())) from error
    _refuse_unused(config, set(flatten(explicit)))
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings of a YAML file.

    Raises:
        BadInputError: no such file, not YAML, or not a mapping.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: not YAML: {' '.join(str(error).split())[:200]}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise BadInputError(
            f"{path}: expected a mapping of settings, found {type(loaded).__name__}"
        )
    return loaded


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"data": {"clients": 3}}`` to ``{"data.clients": 3}``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat


def merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings of both; where both have one, that of `high`."""
    out = dict(low)
    for key, value in high.items():
        old = out.get(key)
        out[key] = (
            merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        )
    return out


def explain(error: Any, model: type[BaseModel] = Config) -> str:
    """One validation error of `model` in words: which setting, what is wrong, and what is known
    there."""
    place = (
        ".".join(str(p) for p in error["loc"] if p not in ("int", "literal['auto']"))
        or "configuration"
    )
    if error["type"] == "extra_forbidden":
        section: Any = model
        for part in error["loc"][:-1]:
            fields = getattr(section, "model_fields", {})
            section = (
                fields[part].annotation if part in fields else (get_args(section) or (section,))[-1]
            )
        known = (
            f" (known here: {', '.join(section.model_fields)})"
            if hasattr(section, "model_fields")
            else ""
        )
        return f"{place}: unknown setting{known}"
    return f"{place}: {error['msg']} (got {error['input']!r})"


def settings_for(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that several methods share, without those that this method, having no latent,
    would not read."""
    if method in VARIATIONAL:
        return dict(given)
    return {
        section: {k: v for k, v in value.items() if f"{section}.{k}" not in _LATENT_SETTINGS}
        if isinstance(value, Mapping)
        else value
        for section, value in given.items()
        if section not in _LATENT_SECTIONS
    }  # fmt: skip


_LATENT_SECTIONS = ("prior", "prototypes", "inference", "objective")
_LATENT_SETTINGS = (
    *(
        f"model.{n}"
        for n in (
            "latent",
            "encoder_hidden",
            "odd_mean",
            "pooling",
            "shrinkage",
            "conditioning",
            "rank",
            "decoder_scale",
        )
    ),
    *(f"federation.{n}" for n in ("protocol", "posterior_from", "context_share")),
)


def _check_privacy(config: Config) -> None:
    """Differential privacy is of sums over clients, with what they depend on fixed beforehand."""
    wrong = [
        (
            config.variational and config.method != "centralised-vpl",
            f"method {config.method} has no private rounds",
        ),
        (
            config.prior.kind == "components",
            "prior.kind must be components: others show every client's posterior",
        ),
        (
            config.prototypes.modes != "auto",
            "prototypes.modes must be a number: finding it reads the clients' choices",
        ),
        (
            config.data.public is not None,
            "data.public must name public pairs, by which the features are whitened",
        ),
        (
            config.federation.aggregator == "mean",
            "federation.aggregator must be mean: a noised sum is all that is known",
        ),
        (
            config.federation.aggregation == "uniform",
            "federation.aggregation must be uniform: the number of pairs is private",
        ),
    ]
    for fine, why in wrong:
        if not fine:
            raise BadInputError(f"privacy: {why}")


def _refuse_unused(config: Config, explicit: set[str]) -> None:
    """A setting that was given on purpose must matter."""
    d, f, variational = config.data, config.federation, config.variational
    anchored = config.prototypes.kind == "anchored"
    mixes = config.prior.kind == "peers" or (config.prior.kind == "components" and not anchored)
    rules: list[tuple[str, bool, str]] = [
        ("data.personas.", d.source == "personas", "data.source is not personas"),
        *((f"data.{name}", d.source != "personas", "personas come divided into users") for name in
          ("split", "partition", "group_ratio", "dirichlet_alpha", "mixing", "protocol",
          "max_pairs", "on_bad_record")),
        *((name, variational, f"{config.method} has no latent") for name in _LATENT_SETTINGS),
        *((f"{name}.", variational, f"{config.method} has no latent") for name in _LATENT_SECTIONS),
        ("model.reward_hidden", config.method == "fedavg-btl-mlp" or (
            variational and config.model.conditioning in ("concat", "film")),
            "the reward has no hidden layer"),
        ("data.group_ratio", d.partition in ("auto", "group", "mixed"),
        "it goes with partition=group or mixed"),
        ("data.dirichlet_alpha", d.partition == "dirichlet", "it goes with partition=dirichlet"),
        ("data.mixing", d.partition == "mixed", "it goes with partition=mixed"),
        ("data.corruption", d.corrupted > 0, "data.corrupted is 0"),
        *((f"prior.{name}", mixes, "the prior of the KL is no mixture") for name in
          ("weights", "temperature", "estimator", "start_round")),
        ("prior.temperature", config.prior.weights == "gumbel", "prior.weights is not gumbel"),
        *((f"prior.{name}", config.prior.kind == "peers", "prior.kind is not peers") for name in
          ("exclude_self", "max_components", "members")),
        ("inference.latent_evidence",
        config.inference.kind == "population" or config.prototypes.kind == "anchored",
         "no components are weighed"),
        ("prototypes.radius", config.prototypes.kind in ("learned", "fixed"),
        "only orthogonal prototypes have one"),
        ("prototypes.start_round", config.prototypes.kind != "none", "prototypes.kind is none"),
        ("objective.orthonormal_weight", config.prototypes.kind == "learned",
        "only learned prototypes are kept so"),
        ("objective.pull_weight", config.prototypes.kind != "none", "prototypes.kind is none"),
        ("objective.kl_warmup_rounds", config.objective.kl_schedule != "constant",
        "kl_schedule is constant"),
        ("model.shrinkage", config.model.pooling == "mean", "it belongs to pooling=mean"),
        ("objective.reward_decay",
        config.model.conditioning == "bilinear" or config.objective.reward_decay == 0,
         "only the bilinear reward has a direction"),
        ("model.rank", config.model.conditioning == "bilinear", "only the bilinear reward has one"),
        ("privacy.", config.privacy.enabled, "privacy.enabled is false"),
        ("federation.aggregator", variational, f"{config.method} has no latent"),
        ("federation.max_norm", variational, f"{config.method} has no latent"),
        ("federation.trim", f.aggregator in ("trimmed-mean", "krum"),
        "it goes with aggregator=trimmed-mean or krum"),
        ("federation.momentum", f.optimiser == "sgd", "optimiser is adam"),
        ("federation.selectors", config.method == "fedbiscuit", "it belongs to fedbiscuit"),
        ("federation.regroup_every", config.method == "fedbiscuit", "it belongs to fedbiscuit"),
        ("federation.finetune_steps", config.method == "fedavg-btl+finetune",
        "nothing is fine-tuned"),
    ]  # fmt: skip
    for prefix, used, why in rules:
        hit = next(
            (
                s
                for s in sorted(explicit)
                if s == prefix or (prefix.endswith(".") and s.startswith(prefix))
            ),
            None,
        )
        if hit and not used:
            raise BadInputError(
                f"{hit} is set but would not be read: {why}; remove it, or change what it"
                " depends on"
            )
    if config.privacy.enabled:
        _check_privacy(config)
    if config.prototypes.kind == "anchored":
        if config.prototypes_start >= f.rounds:
            raise BadInputError(
                f"prototypes.start_round: {config.prototypes_start} of {f.rounds} rounds leaves"
                " none in which the anchors act"
            )
        if f.protocol == "single-pair":
            raise BadInputError(
                "federation.protocol: single-pair has no context that could weigh anchors"
            )
    if config.objective.kl_schedule == "cyclical" and config.objective.kl_warmup_rounds < 2:
        raise BadInputError("objective.kl_warmup_rounds: a cycle needs at least 2 rounds")
    if config.prototypes.kind in ("learned", "fixed"):
        modes = config.prototypes.modes
        if modes == "auto":
            raise BadInputError(
                "prototypes.modes: orthogonal prototypes need a number of modes, not auto"
            )
        if modes > config.model.latent:
            raise BadInputError(
                f"prototypes.modes: {modes} orthogonal prototypes do not fit a latent of"
                f" {config.model.latent} dimensions"
            )
    if isinstance(config.prototypes.modes, int) and config.prototypes.modes < 1:
        raise BadInputError("prototypes.modes: at least 1")
