"""One small seam to experiment trackers; each is an optional package."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fedvpa.config import Config
from fedvpa.errors import BadInputError


@runtime_checkable
class Tracker(Protocol):
    """Takes scalars by round."""

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Log one round."""
        ...


class _Silent:
    def log(self, row: Mapping[str, Any], step: int) -> None:
        pass


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, row: Mapping[str, Any], step: int) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)


class _WandbLike:
    """wandb, and trackio, which has the same interface."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def log(self, row: Mapping[str, Any], step: int) -> None:
        self._module.log(dict(row), step=step)


@contextmanager
def open_tracker(kind: str, root: Path, config: Config) -> Iterator[Tracker]:
    """Open the tracker of that kind for a run, and close it at the end.

    Raises:
        BadInputError: its package is not installed.
    """
    if kind == "none":
        yield _Silent()
        return
    try:
        module = importlib.import_module(
            "torch.utils.tensorboard" if kind == "tensorboard" else kind
        )
    except ImportError as error:
        raise BadInputError(
            f"tracker: {kind} is not installed (pip install {kind}), or use --tracker none"
        ) from error
    if kind == "tensorboard":
        writer = module.SummaryWriter(str(root / "tensorboard"))
        try:
            yield _TensorBoard(writer)
        finally:
            writer.close()
    else:
        module.init(project="fedvpa", name=root.name, config=config.model_dump(mode="json"))
        try:
            yield _WandbLike(module)
        finally:
            module.finish()
