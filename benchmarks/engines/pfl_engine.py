"""The workload on apple/pfl-research's simulated backend: one model in memory, clients one after
the other."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks.workload import initial, train_one


def run_pfl(model: str, clients: int, rounds: int) -> list[float]:
    """Seconds of each round after the first."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    torch.set_num_threads(1)
    start = initial(model)
    times = [time.perf_counter()]

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = torch.nn.ParameterDict(
                {k.replace(".", "__"): v.clone() for k, v in start.items()}
            )

        def loss(self, *batch: Any, **_: Any) -> Any:  # pfl asks for it; the local steps are ours
            raise AssertionError("not called")

        def metrics(self, *batch: Any, **_: Any) -> dict[str, Any]:
            return {}

    class SameLocalSteps(FederatedAveraging):  # type: ignore[type-arg]
        def train_one_user(
            self, initial_model_state: Any, model_: Any, user_dataset: Any, central_context: Any
        ) -> Any:
            values = model_.pytorch_model.values
            start = {k.replace("__", "."): v.detach() for k, v in values.items()}
            round_number = int(central_context.current_central_iteration)
            trained = train_one(model, int(user_dataset.user_id), start, round_number)
            with torch.no_grad():
                for name, value in trained.items():
                    values[name.replace(".", "__")].copy_(value)
            return model_.get_model_difference(initial_model_state), Metrics()

    class Clock(TrainingProcessCallback):  # type: ignore[type-arg]
        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> Any:
            times.append(time.perf_counter())
            return False, Metrics()

    order = iter(list(range(clients)) * (rounds + 3))

    def dataset(user: int) -> Dataset:
        return Dataset([np.zeros((1, 1), dtype=np.float32)], user_id=str(user))

    data = FederatedDataset(dataset, lambda: next(order))
    holder = Holder()
    wrapped = PyTorchModel(
        holder, lambda p: torch.optim.SGD(p, lr=1.0), torch.optim.SGD(holder.parameters(), lr=1.0)
    )
    SameLocalSteps().run(
        NNAlgorithmParams(
            central_num_iterations=rounds + 1,
            evaluation_frequency=10_000,
            train_cohort_size=clients,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=data, val_data=data),
        wrapped,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=1.0, local_batch_size=None),
        callbacks=[Clock()],
    )
    return [b - a for a, b in pairwise(times[1:])]
