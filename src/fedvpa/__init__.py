"""fedvpa: federated variational preference alignment.

What is imported here is the public interface; everything is imported when it is first used, so that
``import fedvpa`` is fast::

    from fedvpa import train, evaluate, PreferenceModel

    run = train("pairs.jsonl", "runs/mine", rounds=30)
    print(evaluate(run, "test.jsonl").results["accuracy"]["own"]["mean"])
    me = PreferenceModel(run).personalize("my_pairs.jsonl")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedvpa.api import evaluate, train
    from fedvpa.config import Config, build_config
    from fedvpa.data.reading import read_pairs
    from fedvpa.errors import BadInputError, FedvpaError
    from fedvpa.experiment.evaluate import Evaluation
    from fedvpa.experiment.train import TrainResult
    from fedvpa.experiment.use import PreferenceModel, UserPreference
    from fedvpa.parts import Part
    from fedvpa.policy.policy import Policy, load_policy
    from fedvpa.records import Item, Message, PreferencePair

__version__ = "0.1.0"

_PUBLIC = {
    "BadInputError": "errors",
    "Config": "config",
    "Evaluation": "experiment.evaluate",
    "FedvpaError": "errors",
    "Item": "records",
    "Message": "records",
    "Part": "parts",
    "Policy": "policy.policy",
    "PreferenceModel": "experiment.use",
    "PreferencePair": "records",
    "TrainResult": "experiment.train",
    "UserPreference": "experiment.use",
    "build_config": "config",
    "evaluate": "api",
    "load_policy": "policy.policy",
    "read_pairs": "data.reading",
    "train": "api",
}
"""Public name to the module that it comes from."""

__all__ = [
    "BadInputError", "Config", "Evaluation", "FedvpaError", "Item", "Message", "Part", "Policy",
    "PreferenceModel", "PreferencePair", "TrainResult", "UserPreference", "__version__",
    "build_config", "evaluate", "load_policy", "read_pairs", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fedvpa' has no attribute '{name}'")
    found = getattr(importlib.import_module(f"fedvpa.{_PUBLIC[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
