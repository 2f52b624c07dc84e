"""From a configuration to an algorithm: the one place where settings meet the code that takes plain numbers."""

from __future__ import annotations

from fedvpa.config import Config
from fedvpa.federated.aggregation import ServerOptimiser
from fedvpa.federated.algorithm import Algorithm
from fedvpa.federated.client import LocalSettings
from fedvpa.federated.monolithic import FederatedReward
from fedvpa.federated.objective import VariationalObjective
from fedvpa.federated.simulation import Simulation
from fedvpa.federated.store import ClientStore
from fedvpa.federated.variational import FederatedVariational, Schedule
from fedvpa.models.encoder import Encoder
from fedvpa.models.reward import ConditionedReward, SharedReward
from fedvpa.models.selector import Selector


def build_reward(config: Config) -> ConditionedReward | SharedReward:
    """The reward of the method, with or without a latent."""
    m = config.model
    if config.variational:
        return ConditionedReward(m.inputs, m.latent, m.conditioning, m.rank, m.reward_hidden, m.decoder_scale)
    return SharedReward(m.inputs, m.reward_hidden if config.method == "fedavg-btl-mlp" else 0)


def build_algorithm(config: Config, store: ClientStore) -> Algorithm:
    """The method of the configuration over the clients of `store`."""
    m, f, o = config.model, config.federation, config.objective
    simulation = Simulation(f.backend, f.chunk, f.workers)
    server = ServerOptimiser(f.server_optimiser, f.server_learning_rate)
    local = LocalSettings(
        config.seed, f.local_steps, f.batch_size, f.context_share, f.optimiser, f.learning_rate, f.momentum,
        f.weight_decay, o.samples, m.latent if config.variational else 0,
    )  # fmt: skip
    reward = build_reward(config)
    if isinstance(reward, SharedReward):
        groups = max(1, len(store.group_index()[0]))
        sharing = {"fedbiscuit": "best", "oracle-group": "group", "oracle-bayes": "group", "local": "none"}.get(
            config.method, "shared"
        )
        return FederatedReward(
            store, reward, local, simulation, server, f.aggregation,
            sharing=sharing,  # type: ignore[arg-type]
            selectors={"best": f.selectors, "group": groups}.get(sharing, 1),
            regroup_every=f.regroup_every,
            finetune_steps=f.finetune_steps if config.method == "fedavg-btl+finetune" else 0,
            infer_group=config.method == "oracle-bayes",
        )  # fmt: skip
    selector = Selector(
        Encoder(m.inputs, m.latent, m.encoder_hidden, m.pooling, m.odd_mean, m.shrinkage),
        reward,
        config.inference.latent_evidence,
    )
    objective = VariationalObjective(
        selector, config.prior.weights, config.prior.temperature, config.prior.estimator, config.prior.exclude_self,
        o.free_bits, o.orthonormal_weight, config.prototypes.radius, f.protocol == "single-pair",
        o.reward_decay if m.conditioning == "bilinear" else 0.0,
    )  # fmt: skip
    schedule = Schedule(
        o.kl_weight, o.kl_schedule, o.kl_warmup_rounds, config.prior.kind, config.prior.start_round, config.prior.members,
        config.prototypes.kind, config.prototypes_start, o.pull_weight,
    )  # fmt: skip
    return FederatedVariational(
        store,
        selector,
        objective,
        local,
        simulation,
        schedule,
        server,
        f.aggregation,
        f.posterior_from,
        modes=None if config.prototypes.modes == "auto" else config.prototypes.modes,
        max_components=config.prior.max_components,
        inference=config.inference.kind,
        centralised=config.method == "centralised-vpl",
    )
