"""From a configuration to a method: the builders that the method's entry names, called with
keywords."""

from __future__ import annotations

from typing import Any

from fedvpa.config import Config
from fedvpa.federated.algorithm import Algorithm
from fedvpa.federated.batch import ClientStore
from fedvpa.parts import resolve
from fedvpa.selector.heads import Head
from fedvpa.selector.reward import SharedReward


def build_algorithm(config: Config, clients: int, **more: Any) -> Algorithm:
    """The server's side of the configured method, for so many clients.

    Args:
        config: the settings.
        clients: how many clients the federation has.
        more: further keywords of the builder, as ``noise=``.

    Raises:
        BadInputError: settings that do not go together.
    """
    entry = config.entry
    build = resolve(entry.algorithm)
    algorithm: Algorithm = build(config=config, clients=clients, **entry.options, **more)
    return algorithm


def build_clients(config: Config, store: ClientStore, total: int = 0, **more: Any) -> Any:
    """The clients of `store` in this process, as the configured method needs them (of `total` in
    all, if these are not all)."""
    build = resolve(config.entry.clients)
    return build(config=config, store=store, total=total or len(store), **more)


def build_method(config: Config, store: ClientStore) -> tuple[Algorithm, Any]:
    """The configured method, and the clients of `store` in this process."""
    return build_algorithm(config, len(store)), build_clients(config, store)


def build_reward(config: Config) -> Head | SharedReward:
    """The reward of the method, with or without a latent."""
    reward: Head | SharedReward = resolve(config.entry.reward)(config=config)
    return reward


def needs_common(config: Config) -> bool:
    """Whether the method's reward reads more of a pair than the difference of its features."""
    return build_reward(config).needs_common
