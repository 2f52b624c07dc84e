"""Command-line flags derived from the settings: name, help and choices of every flag come from one
place, and a command's help shows what that command reads, with the defaults that it will use.

``--help`` shows the basic settings and ``--help-all`` every one. A setting that the method does not
read still has a flag, so that it can be refused with a reason.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fedvpa.config import (
    BASIC,
    build_config,
    explain,
    leaf_settings,
    merged,
    read_yaml,
    short_names,
    value_of,
)
from fedvpa.config.reads import PARTS
from fedvpa.errors import BadInputError
from fedvpa.methods import DEFAULT, METHODS

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class Asked:
    """What a command line says before it is parsed: which help is wanted, and of which method."""

    everything: bool = False
    method: str = DEFAULT
    preset: str = "default"

    @staticmethod
    def of(arguments: Sequence[str]) -> Asked:
        """Read off the arguments; a method that does not exist is refused later, with a reason."""
        method, preset = _value(arguments, "--method"), _value(arguments, "--preset")
        return Asked(
            "--help-all" in arguments,
            method if method in METHODS else DEFAULT,
            "paper" if preset == "paper" else "default",
        )


def _value(arguments: Sequence[str], flag: str) -> str:
    for at, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
        if argument == flag and at + 1 < len(arguments):
            return arguments[at + 1]
    return ""


def kebab(arguments: Sequence[str]) -> list[str]:
    """The arguments with flags of settings in their one spelling: ``--federation.local_steps`` is
    ``--federation.local-steps``."""
    out = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        setting = name.startswith("--") and name[2:] in leaf_settings()
        out.append((name.replace("_", "-") if setting else name) + equals + value)
    return out


def add_settings(
    parser: argparse.ArgumentParser, asked: Asked, shown: Collection[str],
    skip: Collection[str] = (), basic: Collection[str] = BASIC,
    given: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Add ``--config FILE`` and a flag per setting.

    Args:
        parser: the command's.
        asked: which help is wanted.
        shown: names of the settings that the command reads.
        skip: names that get no flag at all.
        basic: names that ``--help`` shows.
        given: settings that the command chooses otherwise than the method does.
    """
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of settings; flags go before it"
    )
    defaults = build_config({"method": asked.method, "preset": asked.preset}, given or {})
    visible = [n for n in shown if n not in skip and (asked.everything or n in basic)]
    short, groups = short_names(), dict[str, Any]()
    for name, info in leaf_settings().items():
        if name in skip:
            continue
        section = name.rpartition(".")[0] or "run"
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        text = _help(info, value_of(defaults, name)) if name in visible else argparse.SUPPRESS
        several: dict[str, Any] = {"action": "append"} if name == "data.columns" else {}
        groups[section].add_argument(
            *_flags(name, short), dest=name, default=argparse.SUPPRESS, help=text,
            metavar=_metavar(name, info), **several,
        )  # fmt: skip
    add_help_all(parser, asked)


def _flags(name: str, short: Mapping[str, str]) -> list[str]:
    """Short name first."""
    flags = [f"--{short[name]}"] if name in short else []
    long = f"--{name.replace('_', '-')}"
    return flags if long in flags else [*flags, long]


def add_help_all(parser: argparse.ArgumentParser, asked: Asked) -> None:
    """The flag that shows all settings."""
    parser.add_argument(
        "--help-all", action="help", help="show this message with every setting, and exit"
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
    for section, own in nested.items():
        if isinstance(own, dict) and not isinstance(file.get(section, {}), Mapping):
            raise BadInputError(f"{arguments.config}: {section}: expected a section of settings")
    return merged(file, nested)


def add_flat_settings(
    parser: argparse.ArgumentParser, model: type[BaseModel], skip: Sequence[str] = ()
) -> None:
    """A flag for every setting of a model without sections, but for those of `skip`."""
    group = parser.add_argument_group("settings")
    for name, info in model.model_fields.items():
        if name in skip:
            continue
        group.add_argument(
            f"--{name.replace('_', '-')}", dest=name, default=argparse.SUPPRESS,
            metavar=_metavar(name, info), help=_help(info, info.default),
        )  # fmt: skip


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


def seed(text: str) -> int:
    """A seed, as an argument's type."""
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is not a whole number from 0 to 2^32 - 1")
    return int(text)


def add_reading(parser: argparse.ArgumentParser, scores: bool = True) -> None:
    """How the records of a command's own source are read."""
    usual = "few" if scores else "as in training"
    parser.add_argument(
        "--on-bad-record", choices=["few", "error", "skip"], default="few" if scores else None,
        help="few: skip records that compare nothing while under 1 %% of a file (default:"
        f" {usual})",
    )  # fmt: skip
    parser.add_argument(
        "--column", action="append", default=[], metavar="FIELD=COLUMN",
        help="a field under another name, as client_id=user_id (repeatable)",
    )  # fmt: skip
    if not scores:
        return
    parser.add_argument(
        "--score-margin", type=float, default=0.0, metavar="X",
        help="rated responses make a pair where ratings differ by more than this (default: 0)",
    )  # fmt: skip


def columns_given(arguments: argparse.Namespace) -> dict[str, str]:
    """Columns by field, of ``--column``.

    Raises:
        BadInputError: not of the form FIELD=COLUMN.
    """
    return _columns(arguments.column)


def _columns(given: Sequence[str]) -> dict[str, str]:
    from fedvpa.data.preferences import columns_of

    try:
        return columns_of(given)
    except ValueError as error:
        raise BadInputError(f"--column: {error}") from error


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """``--json [FILE]``."""
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help=f"write {what} as JSON (to standard output without FILE)",
    )  # fmt: skip


def add_common(parser: argparse.ArgumentParser) -> None:
    """Flags of every command."""
    parser.add_argument("--quiet", action="store_true", help="print results and errors only")
    parser.add_argument("--debug", action="store_true", help="verbose log, and tracebacks")


def _parsed(info: FieldInfo, value: Any) -> Any:
    """Text as given; lists by commas; columns by field; 'none' where a setting may be None.
    Everything else is pydantic's to check."""
    if isinstance(value, list):
        return _columns(value)
    if get_origin(info.annotation) is tuple:
        return [part for part in value.strip("[]() ").replace(" ", "").split(",") if part]
    if value.lower() == "none" and type(None) in get_args(info.annotation):
        return None
    return value


def _metavar(name: str, info: FieldInfo) -> str:
    if name == "data.columns":
        return "FIELD=COLUMN"
    choices = _choices(name, info.annotation)
    return "{" + ",".join(choices) + "}" if choices else name.rsplit(".", 1)[-1].upper()


def _choices(name: str, annotation: Any) -> list[str]:
    if name == "method":
        return list(METHODS)
    if name in PARTS and name != "data.source":
        return list(PARTS[name][1])
    arguments = get_args(annotation)
    named = bool(arguments) and all(isinstance(a, str) for a in arguments)
    return [str(a) for a in arguments] if named else []


def _help(info: FieldInfo, default: Any) -> str:
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default or "")
    shown = str(default).lower() if isinstance(default, bool | int | float) else shown
    return f"{info.description or ''} (default: {shown or 'none'})".replace("%", "%%").strip()
