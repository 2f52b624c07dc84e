"""The workload on Flower's simulation engine (Ray): its defaults, and its best settings on a small
machine."""

from __future__ import annotations

import logging
import os
import time
from itertools import pairwise
from typing import Any

from benchmarks.workload import PAIRS, initial, train_one


def run_flower(model: str, best: bool, clients: int, rounds: int) -> list[float]:
    """Seconds of each round after the first. Defaults: two cores a client; best: one core and one
    thread a client."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    client_app, server_app = ClientApp(), ServerApp()
    starts: list[float] = []

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"].to_torch_state_dict()
        client = int(context.node_config["partition-id"])
        round_number = int(message.content["config"]["server-round"])
        trained = train_one(model, client, dict(arrays), round_number)
        content = RecordDict(
            {"arrays": ArrayRecord(trained), "metrics": MetricRecord({"num-examples": PAIRS})}
        )
        return Message(content=content, reply_to=message)

    class Timed(FedAvg):
        def configure_train(self, *arguments: Any, **named: Any) -> Any:
            starts.append(time.perf_counter())
            return super().configure_train(*arguments, **named)

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=clients)
        strategy.start(grid=grid, initial_arrays=ArrayRecord(initial(model)), num_rounds=rounds + 1)
        starts.append(time.perf_counter())

    backend = {"client_resources": {"num_cpus": 1 if best else 2, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, num_supernodes=clients, backend_config=backend)
    return [b - a for a, b in pairwise(starts[1:])]
