"""The workload that all engines share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from fedvpa.config import Config, build_config
from fedvpa.experiment.build import build_method
from fedvpa.federated.batch import ClientStore, build_store
from fedvpa.federated.clients import SimulatedClients
from fedvpa.federated.local import stack, train_locally
from fedvpa.federated.objective import RoundContext
from fedvpa.federated.random import stream
from fedvpa.federated.variational import FederatedVariational
from fedvpa.types import Params

PAIRS = 40
COMMON = {"method": "fedvpl", "federation": {"cohort": 0, "batch_size": 8, "local_steps": 30}}
PAPER_SIZE = {
    "model": {
        "inputs": 576, "latent": 32, "encoder_hidden": (512, 256, 128), "odd_mean": False,
        "conditioning": "concat",
        "reward_hidden": 256,
    },
}  # fmt: skip


def settings(model: str, backend: str = "vectorised") -> Config:
    """Configuration of a benchmark model."""
    return build_config(
        COMMON, PAPER_SIZE if model == "paper-size" else {}, {"federation": {"backend": backend}}
    )


def client_data(model: str, client: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Difference and mean of the features of one client's pairs, [40, p] each."""
    inputs = settings(model).model.inputs
    generator = stream(0, "benchmark", client)
    return torch.randn(PAIRS, inputs, generator=generator), torch.randn(
        PAIRS, inputs, generator=generator
    )


def make_store(model: str, clients: range) -> ClientStore:
    """The clients' pairs."""
    data = [client_data(model, c) for c in clients]
    commons = [c for _, c in data] if settings(model).model.conditioning == "concat" else None
    names = [f"c{c}" for c in clients]
    return build_store(
        names, [None] * len(names), [d for d, _ in data], commons, [torch.ones(PAIRS)] * len(names)
    )


def build(
    model: str, clients: int, backend: str = "vectorised"
) -> tuple[FederatedVariational, SimulatedClients]:
    """Our algorithm, and the clients of the workload."""
    return _built(settings(model, backend), make_store(model, range(clients)))


def natural_sizes(clients: int) -> list[int]:
    """Numbers of pairs as people have them: log-normal, the largest of hundreds of clients with
    some thirty times the mean."""
    generator = stream(0, "natural", clients)
    return [
        max(1, round(float(n)))
        for n in (3.4 + 1.1 * torch.randn(clients, generator=generator)).exp()
    ]


def build_sized(sizes: Sequence[int]) -> tuple[FederatedVariational, SimulatedClients]:
    """The default model on all pairs of clients with so many pairs each (every step reads them
    all)."""
    config = build_config(COMMON, {"federation": {"batch_size": 0}})
    generator, p = stream(0, "sized"), config.model.inputs
    names = [f"c{c}" for c in range(len(sizes))]
    return _built(config, build_store(
        names, [None] * len(names), [torch.randn(n, p, generator=generator) for n in sizes], None,
        [torch.ones(n) for n in sizes],
    ))  # fmt: skip


def initial(model: str) -> Params:
    """The parameters before the first round."""
    algorithm, clients = build(model, 1)
    return algorithm.init(clients.roster).params


@cache
def single(model: str, client: int) -> SimulatedClients:
    """What a Flower or pfl client holds: itself alone."""
    return _built(settings(model), make_store(model, range(client, client + 1)))[1]


def _built(config: Config, store: ClientStore) -> tuple[FederatedVariational, SimulatedClients]:
    algorithm, clients = build_method(config, store)
    assert isinstance(algorithm, FederatedVariational)
    assert isinstance(clients, SimulatedClients)
    return algorithm, clients


def train_one(model: str, client: int, params: Params, round_number: int) -> Params:
    """One client's local round; the same steps whichever engine calls it."""
    torch.set_num_threads(1)
    clients = single(model, client)
    pairs = clients.store.batch([0])
    none = torch.full((1,), -1)
    context = RoundContext(None, None, None, none, none, clients.schedule.kl_weight, 0.0)
    loss = clients.objective.given(context)
    result = train_locally(
        loss, stack(params, 1), pairs, [f"c{client}"], round_number, clients.local
    )
    return {name: value[0] for name, value in result.params.items()}
