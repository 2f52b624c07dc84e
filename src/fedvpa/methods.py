"""What `--method` can be: each method's defaults, the settings that it reads, and its builders.

To add a method, write a builder and add one entry here. "Set but would not be read" follows from
`reads` and from the parts that are chosen (see `fedvpa.config.reads`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedvpa.errors import BadInputError

EVERY = (
    "method", "preset", "seed", "out", "tracker", "features.*", "model.inputs",
    "model.scaling",
    "data.source", "data.clients", "data.validation_share", "data.public", "data.corrupted",
    "data.content", "federation.rounds", "federation.cohort",
    "federation.aggregation", "federation.server_optimiser", "federation.server_learning_rate",
    "federation.backend", "federation.chunk", "federation.workers",
    "federation.checkpoint_every", "federation.validate_every",
)  # fmt: skip
"""Settings that every method reads."""

STEPS = (
    "federation.local_steps", "federation.batch_size", "federation.optimiser",
    "federation.learning_rate", "federation.weight_decay",
)  # fmt: skip
"""Settings of methods whose clients take steps of their own."""

LATENT = (
    *STEPS, "model.latent", "model.encoder_hidden", "model.odd_mean", "model.pooling",
    "model.conditioning", "model.decoder_scale", "prior.kind", "prototypes.kind",
    "prototypes.modes", "inference.kind", "objective.kl_weight", "objective.kl_schedule",
    "objective.free_bits", "objective.samples",
    "federation.protocol", "federation.posterior_from", "federation.context_share",
    "federation.aggregator", "federation.max_norm",
)  # fmt: skip
"""Settings that every method with a latent preference reads."""


@dataclass(frozen=True)
class Method:
    """A method.

    Args:
        about: what it trains.
        served: how a user is served by what was trained.
        algorithm: builder of the server's side, called with ``config=, clients=`` (how many there
            are), ``noise=`` (of a private release) and `options`.
        reward: builder of the reward that it trains, called with ``config=``.
        clients: builder of simulated clients, called with ``config=, store=, total=, identity=``.
        reads: settings that it reads beside `EVERY`.
        options: fixed keywords of the builder.
        defaults: its settings, where they differ from the built-in ones.
        paper: the same under ``--preset paper``.
        private: the same under differential privacy, over the others.
        bounds: settings that it reads under differential privacy.
        latent: whether it infers a latent preference.
        networked: whether it runs as a federation across machines.
        summed: whether all that its server asks for are sums over clients.
        role: `monolithic` or `oracle`: closure counts from the best of the first to the second.
        published: what it is under ``--preset paper``, where that is built of other parts.
    """

    about: str
    served: str
    algorithm: str
    clients: str
    reward: str
    reads: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, Any] = field(default_factory=dict)
    private: dict[str, Any] = field(default_factory=dict)
    bounds: tuple[str, ...] = ()
    latent: bool = False
    networked: bool = False
    summed: bool = False
    role: str = ""
    published: Method | None = None


NOISED = (
    "privacy.noise", "privacy.clip", "privacy.fit_noise", "privacy.delta", "privacy.budget",
)  # fmt: skip
"""Settings of differential privacy, whatever is released."""

_SELECTOR: dict[str, Any] = {
    "algorithm": "fedvpa.federated.variational:build",
    "clients": "fedvpa.federated.clients:build",
    "reward": "fedvpa.selector.heads:build_head",
    "reads": (*LATENT, "privacy.enabled"),
    "bounds": (*NOISED, "privacy.latent_clip", "privacy.variance_clip"),
    "latent": True,
    "networked": True,
}
_REWARD: dict[str, Any] = {
    "algorithm": "fedvpa.federated.rewards:build",
    "clients": "fedvpa.federated.rewards:build_clients",
    "reward": "fedvpa.selector.reward:build_linear",
    "reads": STEPS,
}
_BAYES = {"inference": {"kind": "population"}}
_ANCHORS = {"prototypes": {"kind": "anchored"}, "objective": {"pull_weight": 0.01}}
_PEERS = {"prior": {"kind": "peers", "weights": "gumbel", "members": "last-round"}}
_LEARNED = {"prototypes": {"kind": "learned", "modes": 2}}

_PUBLISHED = Method(
    "the published method: encoder and conditioned reward, mixture prior of the peers, orthogonal "
    "prototypes",
    "Bayes over components that are fitted after training",
    **_SELECTOR,
    paper=_BAYES | _PEERS | _LEARNED,
)

METHODS: dict[str, Method] = {
    "fedvpa-gp": Method(
        "a bilinear reward under a federated mixture prior, whose order and width are chosen by "
        "held-out contents",
        "Bayes under the mixture prior",
        algorithm="fedvpa.federated.bayes.build:build",
        clients="fedvpa.federated.bayes.clients:build",
        reward="fedvpa.selector.heads:build_head",
        reads=("model.latent", "population.*", "privacy.enabled"),
        defaults={
            "model": {"inputs": 128, "scaling": "principal"},
            "federation": {
                "aggregation": "samples",
                "server_optimiser": "adam",
                "server_learning_rate": 0.05,
            },
        },
        private={
            "model": {"inputs": 16},
            "population": {"structure": "directions", "order": 2, "ridge": 0.001},
            "federation": {"aggregation": "uniform"},
            "privacy": {"clip": 0.5, "fit_noise": 20.0},
        },
        bounds=(*NOISED, "privacy.gain_clip"),
        latent=True,
        networked=True,
        summed=True,
        published=_PUBLISHED,
    ),
    "fedvpl+anchors": Method(
        "FedVPL for 2/5 of the rounds (`prototypes.start_round`), then anchored components, to "
        "which the encoder is pulled",
        "Bayes over the components",
        **_SELECTOR,
        defaults=_BAYES
        | {
            "prototypes": {"kind": "anchored"},
            "objective": {"pull_weight": 0.01, "reward_decay": 0.03},
        },
    ),
    "fedvpl": Method(
        "encoder and conditioned reward (M1, M2), prior N(0, I)", "the encoder's mean", **_SELECTOR
    ),
    "fedvpl+mix": Method(
        "as `fedvpl`",
        "Bayes over components that are fitted after training",
        **_SELECTOR,
        defaults=_BAYES,
        paper=_PEERS,
    ),
    "fedvpl+ortho": Method(
        "anchored components with the pull", "the encoder's mean", **_SELECTOR,
        defaults=_ANCHORS, paper=_LEARNED,
    ),
    "fedavg-btl": Method(
        "one shared linear reward", "the same for everybody", **_REWARD, role="monolithic"
    ),
    "fedavg-btl-mlp": Method(
        "one shared reward, an MLP", "the same for everybody",
        **_REWARD | {"reward": "fedvpa.selector.reward:build_mlp",
                   "reads": (*STEPS, "model.reward_hidden")},
        role="monolithic",
    ),
    "fedavg-btl+finetune": Method(
        "one shared linear reward", "local steps on the user's context",
        **_REWARD | {"reads": (*STEPS, "federation.finetune_steps")}, options={"finetune": True},
    ),
    "fedbiscuit": Method(
        "U rewards, of which clients choose the best in equal numbers", "majority vote",
        **_REWARD
        | {"reads": (*STEPS, "federation.selectors", "federation.regroup_every")},
        options={"sharing": "best"},
    ),
    "local": Method(
        "nothing is shared", "a reward that is fitted to the user's context", **_REWARD,
        options={"sharing": "none"},
    ),
    "centralised-vpl": Method(
        "FedVPL on pooled pairs", "the encoder's mean",
        **_SELECTOR | {"clients": "fedvpa.federated.clients:build_pooled", "reads": LATENT,
                       "networked": False},
    ),
    "oracle-group": Method(
        "one reward per true group", "the reward of the user's true group", **_REWARD,
        options={"sharing": "group"}, role="oracle",
    ),
    "oracle-bayes": Method(
        "one reward per true group", "Bayes over the groups' rewards", **_REWARD,
        options={"sharing": "group", "infer_group": True},
    ),
}  # fmt: skip

DEFAULT = "fedvpa-gp"
"""The method, unless another is named."""

PAPER: dict[str, Any] = {
    "model": {
        "latent": 32, "encoder_hidden": (512, 256, 128), "odd_mean": False, "shrinkage": 0.0,
        "conditioning": "additive",
    },
    "objective": {"kl_weight": 0.1, "pull_weight": 1.0, "orthonormal_weight": 0.1},
    "federation": {
        "cohort": 10, "batch_size": 8, "protocol": "single-pair", "posterior_from": "local",
        "learning_rate": 0.001,
    },
}  # fmt: skip
"""The published settings, ``--preset paper``; each method adds its own `Method.paper`."""


def entry_of(name: str, preset: str = "default") -> Method:
    """What the method is under a preset.

    Raises:
        BadInputError: no such method; the known ones are listed.
    """
    found = method(name)
    return found.published if preset == "paper" and found.published is not None else found


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        BadInputError: no such method; the known ones are listed.
    """
    if name not in METHODS:
        raise BadInputError(f"unknown method '{name}' (known: {', '.join(METHODS)})")
    return METHODS[name]
