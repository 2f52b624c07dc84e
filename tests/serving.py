"""A run and a policy to serve, and a server in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import uvicorn
from peft import get_peft_model

from fedvpa import train
from fedvpa.experiment.preferences import named_preferences
from fedvpa.experiment.use import PreferenceModel
from fedvpa.features.loading import load_causal_model
from fedvpa.policy.card import PolicyCard, save_card
from fedvpa.policy.conditioning import attach, save_conditioner
from fedvpa.policy.policy import new_conditioner
from fedvpa.serving.app import build_app
from fedvpa.serving.model import Served, open_served
from fedvpa.serving.settings import ServingSettings
from tests.conftest import write_groups
from tests.unit.test_alignment import LORA


def make_run(folder: Path, tiny_model: Path, seed: int = 0) -> Path:
    """A run of two opposed groups; its pairs are beside it."""
    data = write_groups(folder / "data")
    train(
        str(data), folder / "run", split="train", backbone=str(tiny_model), layer=2,
        dtype="float32", clients=6, seed=seed, rounds=12, inputs=16, latent=4, structure="groups",
        order=2,
    )  # fmt: skip
    return folder / "run"


def make_policy(folder: Path, tiny_model: Path, run: Path) -> Path:
    """A policy with a random adapter that the run's two preferences gate."""
    selector = PreferenceModel(run)
    base = load_causal_model(str(tiny_model), None, "cpu")
    named = {name: z.tolist() for name, z in named_preferences(selector).items()}
    card = PolicyCard(
        str(tiny_model), base.revision, "gate", named, selector.neutral.tolist(),
        selector.neutral.tolist(), 1.0, str(run), run=selector.run.identity,
    )  # fmt: skip
    torch.manual_seed(0)
    conditioner = new_conditioner(card, base.module, base.tokenizer, 4, 3)
    own = deepcopy(LORA)
    own.base_model_name_or_path = None
    model: Any = get_peft_model(base.module, own)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *conditioner.named_parameters()]:
            if "lora" in name or name in ("weight", "offset"):
                value.add_(torch.randn(value.shape) * 0.7)
    folder.mkdir()
    model.save_pretrained(str(folder / "adapter"))
    attach(model, conditioner)
    save_conditioner(conditioner, folder)
    save_card(card, folder)
    return folder


@contextmanager
def serving(directory: Path, **more: Any) -> Iterator[tuple[str, Served]]:
    """A server on loopback: its address, and what it serves."""
    settings = ServingSettings(directory=str(directory), port=0, rows=8, **more)
    served = open_served(settings)
    # every turn ends with the tiny tokenizer's own token
    served.engine._policy.stops = [1]  # type: ignore[attr-defined]
    config = uvicorn.Config(
        build_app(served, settings), port=0, log_config=None, timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", served
    finally:
        server.should_exit = True
        thread.join()
