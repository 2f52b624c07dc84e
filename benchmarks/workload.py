"""The workload that all engines share."""

from __future__ import annotations

from functools import cache

import torch

from fedvpa.config import Config, build_config
from fedvpa.experiment.build import build_algorithm
from fedvpa.federated.batch import ClientStore, build_store
from fedvpa.federated.clients import ClientSide
from fedvpa.federated.draws import stream
from fedvpa.federated.local import stack, train_locally
from fedvpa.federated.objective import RoundContext
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


def build(model: str, clients: int, backend: str = "vectorised") -> FederatedVariational:
    """Our algorithm over the workload."""
    algorithm = build_algorithm(settings(model, backend), make_store(model, range(clients)))
    assert isinstance(algorithm, FederatedVariational)
    return algorithm


@cache
def single(model: str, client: int) -> FederatedVariational:
    """The algorithm over one client: what a Flower or pfl client holds."""
    return build_algorithm(settings(model), make_store(model, range(client, client + 1)))  # type: ignore[return-value]


def train_one(model: str, client: int, params: Params, round_number: int) -> Params:
    """One client's local round; the same steps whichever engine calls it."""
    torch.set_num_threads(1)
    algorithm = single(model, client)
    clients = algorithm.participants
    assert isinstance(clients, ClientSide)
    pairs, local = clients.store.batch([0]), clients.local
    none = torch.full((1,), -1)
    context = RoundContext(None, None, None, none, none, algorithm.schedule.kl_weight, 0.0)
    result = train_locally(
        algorithm.objective, stack(params, 1), pairs, [f"c{client}"], round_number, local, context
    )
    return {name: value[0] for name, value in result.params.items()}
