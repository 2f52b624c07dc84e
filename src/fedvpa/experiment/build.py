"""From a configuration to an algorithm: the one place where settings meet the code that takes plain
numbers."""

from __future__ import annotations

import math

from fedvpa.config import Config
from fedvpa.errors import BadInputError
from fedvpa.federated.aggregators import ServerOptimiser
from fedvpa.federated.algorithm import Algorithm
from fedvpa.federated.batch import ClientStore
from fedvpa.federated.clients import ClientSide, Participants, Schedule
from fedvpa.federated.local import LocalSettings
from fedvpa.federated.objective import VariationalObjective
from fedvpa.federated.privacy import Privacy
from fedvpa.federated.rewards import FederatedReward
from fedvpa.federated.simulation import Simulation
from fedvpa.federated.variational import FederatedVariational
from fedvpa.selector.encoder import Encoder
from fedvpa.selector.reward import ConditionedReward, SharedReward
from fedvpa.selector.selector import Selector


def build_reward(config: Config) -> ConditionedReward | SharedReward:
    """The reward of the method, with or without a latent."""
    m = config.model
    if config.variational:
        return ConditionedReward(
            m.inputs, m.latent, m.conditioning, m.rank, m.reward_hidden, m.decoder_scale
        )
    return SharedReward(m.inputs, m.reward_hidden if config.method == "fedavg-btl-mlp" else 0)


def build_algorithm(config: Config, store: ClientStore) -> Algorithm:
    """The method of the configuration over the clients of `store`, in this process."""
    if config.variational:
        return build_variational(config, build_clients(config, store))
    f = config.federation
    reward = build_reward(config)
    assert isinstance(reward, SharedReward)
    groups = max(1, len(store.group_index()[0]))
    sharing = {
        "fedbiscuit": "best",
        "oracle-group": "group",
        "oracle-bayes": "group",
        "local": "none",
    }.get(config.method, "shared")
    return FederatedReward(
        store, reward, _local(config), _simulation(config), _server(config), f.aggregation,
        sharing=sharing,  # type: ignore[arg-type]
        selectors={"best": f.selectors, "group": groups}.get(sharing, 1),
        regroup_every=f.regroup_every,
        finetune_steps=f.finetune_steps if config.method == "fedavg-btl+finetune" else 0,
        infer_group=config.method == "oracle-bayes",
    )  # fmt: skip


def build_variational(
    config: Config, participants: Participants, *, secret: bool = False, together: bool = False
) -> FederatedVariational:
    """The server's side of a variational method, over clients in this process or elsewhere;
    `secret`: privacy's noise cannot be repeated; `together`: participants answer with sums."""
    return FederatedVariational(
        participants,
        _selector(config),
        _objective(config),
        config.seed,
        _schedule(config),
        _server(config),
        config.federation.aggregation,
        modes=_modes(config),
        max_components=config.prior.max_components,
        inference=config.inference.kind,
        centralised=config.method == "centralised-vpl",
        aggregator=config.federation.aggregator,
        trim=config.federation.trim,
        max_norm=config.federation.max_norm,
        privacy=build_privacy(config, len(participants)),
        secret=secret,
        together=together,
    )


def build_privacy(config: Config, clients: int) -> Privacy | None:
    """Bounds and noise of differential privacy; None where it is off."""
    p = config.privacy
    if not p.enabled:
        return None
    modes = _modes(config) or 1
    if 3 * p.fit_noise * modes >= clients:
        raise BadInputError(
            f"privacy.fit_noise: noise of {p.fit_noise:g} hides components of about"
            f" {clients / modes:g} clients each; at most {clients / modes / 3:.3g} for {clients}"
            f" clients and {modes} components (epsilon grows), or more clients"
        )
    summed = config.prior.kind == "components" and config.prototypes.kind != "anchored"
    return Privacy(
        rate=min(1.0, (config.federation.cohort or clients) / clients),
        clients=clients,
        clip=p.clip,
        noise=p.noise,
        latent_clip=p.latent_clip,
        variance_clip=p.variance_clip,
        fit_noise=p.fit_noise,
        delta=p.delta,
        budget=p.budget or math.inf,
        moments_every_round=summed,
        choices_every_round=summed and config.prototypes.kind in ("learned", "fixed"),
    )


def build_clients(config: Config, store: ClientStore, clients: int = 0) -> ClientSide:
    """The clients' side of a variational method, for the clients of `store` (of `clients` in
    all, if it is not all)."""
    schedule = _schedule(config)
    return ClientSide(
        store,
        _selector(config),
        _objective(config),
        _local(config),
        _simulation(config),
        schedule,
        config.federation.posterior_from,
        withholds=schedule.anchored and _modes(config) is None and schedule.prototypes_start > 0,
        centralised=config.method == "centralised-vpl",
        privacy=build_privacy(config, clients or len(store)),
    )


def _simulation(config: Config) -> Simulation:
    f = config.federation
    return Simulation(f.backend, f.chunk, f.workers)


def _server(config: Config) -> ServerOptimiser:
    return ServerOptimiser(
        config.federation.server_optimiser, config.federation.server_learning_rate
    )


def _local(config: Config) -> LocalSettings:
    f = config.federation
    return LocalSettings(
        config.seed, f.local_steps, f.batch_size, f.context_share, f.optimiser, f.learning_rate,
        f.momentum,
        f.weight_decay, config.objective.samples, config.model.latent if config.variational else 0,
    )  # fmt: skip


def _selector(config: Config) -> Selector:
    m = config.model
    reward = build_reward(config)
    assert isinstance(reward, ConditionedReward)
    encoder = Encoder(m.inputs, m.latent, m.encoder_hidden, m.pooling, m.odd_mean, m.shrinkage)
    return Selector(encoder, reward, config.inference.latent_evidence)


def _objective(config: Config) -> VariationalObjective:
    o, prior = config.objective, config.prior
    return VariationalObjective(
        _selector(config), prior.weights, prior.temperature, prior.estimator, prior.exclude_self,
        o.free_bits, o.orthonormal_weight, config.prototypes.radius,
        config.federation.protocol == "single-pair",
        o.reward_decay if config.model.conditioning == "bilinear" else 0.0,
    )  # fmt: skip


def _schedule(config: Config) -> Schedule:
    o, prior = config.objective, config.prior
    return Schedule(
        o.kl_weight, o.kl_schedule, o.kl_warmup_rounds, prior.kind, prior.start_round,
        prior.members,
        config.prototypes.kind, config.prototypes_start, o.pull_weight,
    )  # fmt: skip


def _modes(config: Config) -> int | None:
    return None if config.prototypes.modes == "auto" else config.prototypes.modes
