"""Command-line flags derived from the configuration: every setting has a flag, its help and its
default from one place."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fedvpa.config import Config, explain, merged, read_yaml
from fedvpa.errors import BadInputError

T = TypeVar("T", bound=BaseModel)

_RENAMED = {"data.source": "data"}
"""Settings whose short flag is not the last part of their name."""


def leaf_settings(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """Dotted name of every setting."""
    out: dict[str, FieldInfo] = {}
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            out.update(leaf_settings(kind, f"{prefix}{name}."))
        else:
            out[f"{prefix}{name}"] = info
    return out


def short_flags() -> dict[str, str]:
    """Dotted name to short flag, for the settings whose last part is unique."""
    settings = leaf_settings()
    counts = Counter(name.rsplit(".", 1)[-1] for name in settings)
    out = {}
    for name in settings:
        last = name.rsplit(".", 1)[-1]
        if name in _RENAMED:
            out[name] = f"--{_RENAMED[name]}"
        elif counts[last] == 1:
            out[name] = f"--{last.replace('_', '-')}"
    return out


def add_settings(parser: argparse.ArgumentParser, skip: tuple[str, ...] = ()) -> None:
    """Add ``--config FILE`` and a flag for every setting but those in `skip`."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of settings; flags go before it"
    )
    short = short_flags()
    groups: dict[str, Any] = {}
    for name, info in leaf_settings().items():
        if name in skip:
            continue
        section = name.rpartition(".")[0] or "run"
        group = groups.setdefault(section, parser.add_argument_group(section))
        flags = [short[name]] if name in short else []
        if "." in name and f"--{name}" not in flags:
            flags.append(f"--{name}")
        choices = _choices(info.annotation)
        group.add_argument(
            *flags,
            dest=name,
            default=argparse.SUPPRESS,
            metavar="{" + ",".join(choices) + "}" if choices else name.rsplit(".", 1)[-1].upper(),
            help=f"{info.description or ''} (default: {_shown(info.default)})".replace(
                "%", "%%"
            ).strip(),
        )


def settings_given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Nested settings from ``--config`` and the flags that were given.

    Raises:
        BadInputError: the file cannot be read, or is not a mapping.
    """
    nested: dict[str, Any] = {}
    known = leaf_settings()
    for name, value in vars(arguments).items():
        if name not in known:
            continue
        *path, last = name.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = _parsed(known[name], value)
    file: Mapping[str, Any] = (
        read_yaml(arguments.config) if getattr(arguments, "config", None) else {}
    )
    return merged(file, nested)


def add_flat_settings(parser: argparse.ArgumentParser, model: type[BaseModel]) -> None:
    """A flag for every setting of a model without sections."""
    group = parser.add_argument_group("settings")
    for name, info in model.model_fields.items():
        choices = _choices(info.annotation)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            metavar="{" + ",".join(choices) + "}" if choices else name.upper(),
            help=f"{info.description or ''} (default: {_shown(info.default)})".replace(
                "%", "%%"
            ).strip(),
        )


def flat_settings_given(arguments: argparse.Namespace, model: type[T]) -> T:
    """The checked model from the flags that were given.

    Raises:
        BadInputError: a value that the model refuses.
    """
    given = {
        name: getattr(arguments, name) for name in model.model_fields if hasattr(arguments, name)
    }
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise BadInputError("; ".join(explain(e, model) for e in error.errors())) from error


def _parsed(info: FieldInfo, value: str) -> Any:
    """Text as given; lists by commas; 'none' where a setting may be None. Everything else is
    pydantic's to check."""
    if get_origin(info.annotation) is tuple:
        return [part for part in value.strip("[]() ").replace(" ", "").split(",") if part]
    if value.lower() == "none" and type(None) in get_args(info.annotation):
        return None
    return value


def _choices(annotation: Any) -> list[str]:
    arguments = get_args(annotation)
    return (
        [str(a) for a in arguments]
        if arguments and all(isinstance(a, str) for a in arguments)
        else []
    )


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
