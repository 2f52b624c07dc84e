"""Layers of settings become one checked configuration: built-in defaults < preset < method < file <
flags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from fedvpa.config.reads import leaf_settings, settings_read, settings_readable, unread, why_unread
from fedvpa.config.sections import Config
from fedvpa.errors import BadInputError
from fedvpa.foreign import harmless
from fedvpa.methods import DEFAULT, METHODS, PAPER, entry_of


def build_config(*layers: Mapping[str, Any]) -> Config:
    """Merge explicit settings over the defaults of their preset and method, and check the result.

    Args:
        layers: nested settings, as ``{"federation": {"rounds": 3}}``; later ones win.

    Raises:
        BadInputError: an unknown name, a bad value, or a setting that nothing would read.

    Example:
        >>> config = build_config({"method": "fedvpl"}, {"federation": {"rounds": 3}})
        >>> config.federation.rounds, config.inference.kind
        (3, 'amortised')
    """
    explicit: dict[str, Any] = {}
    for layer in layers:
        explicit = merged(explicit, layer)
    named = explicit.get("method", DEFAULT), explicit.get("preset", "default")
    base = defaults_of(*named, _private(explicit)) if all(isinstance(n, str) for n in named) else {}
    for name, value in flatten(explicit).items():
        kind = leaf_settings()[name].annotation if name in leaf_settings() else bool
        if isinstance(value, bool) and "bool" not in str(kind):
            raise BadInputError(f"{name}: '{str(value).lower()}' is no value of it")
    try:
        config = Config.model_validate(merged(base, explicit))
    except ValidationError as error:
        raise BadInputError("; ".join(explain(e) for e in error.errors())) from error
    for name in unread(config, flatten(explicit)):
        raise BadInputError(
            f"{name} is set but would not be read: {why_unread(config, name)}; remove it, or change"
            " what it depends on"
        )
    _check(config)
    return config


def _private(settings: Mapping[str, Any]) -> bool:
    """Whether differential privacy is asked for; what is no truth value is refused elsewhere."""
    section = settings.get("privacy")
    given = section.get("enabled", False) if isinstance(section, Mapping) else False
    try:
        return TypeAdapter(bool).validate_python(given)
    except ValidationError:
        return False


def defaults_of(name: str, preset: str = "default", private: bool = False) -> dict[str, Any]:
    """A method's settings under a preset, and under differential privacy, where they differ from
    the built-in ones."""
    if name not in METHODS:  # validation says so
        return {}
    entry = entry_of(name, preset)
    found = merged(PAPER, entry.paper) if preset == "paper" else dict(entry.defaults)
    return merged(found, entry.private) if private else found


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings of a YAML file.

    Raises:
        BadInputError: no such file, not YAML, or not a mapping.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInputError(
            f"{path}: not YAML: {harmless(' '.join(str(error).split()))}"
        ) from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise BadInputError(
            f"{path}: expected a mapping of settings, found {type(loaded).__name__}"
        )
    return loaded


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which takes the last of two equal keys without a word, but for that."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1 and key != "<<"]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"'{twice[0]}' stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"data": {"clients": 3}}`` to ``{"data.clients": 3}``; columns are one setting."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, Mapping) and f"{prefix}{key}" != "data.columns"
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings of both; where both have one, that of `high`."""
    out = dict(low)
    for key, value in high.items():
        old = out.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        out[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return out


def explain(error: Any, model: type[BaseModel] = Config) -> str:
    """One validation error of `model` in words: which setting, what is wrong, and what is known
    there."""
    place = ".".join(str(p) for p in error["loc"] if p not in ("int", "literal['auto']"))
    place = place or "configuration"
    if error["type"] == "extra_forbidden":
        section: Any = model
        for part in error["loc"][:-1]:
            fields = getattr(section, "model_fields", {})
            known_part = part in fields
            section = (
                fields[part].annotation if known_part else (get_args(section) or (section,))[-1]
            )
        has_fields = hasattr(section, "model_fields")
        known = f" (known here: {', '.join(section.model_fields)})" if has_fields else ""
        return f"{place}: unknown setting{known}"
    if error["type"] == "value_error":
        return f"{place}: {error['msg'].removeprefix('Value error, ')}"
    return f"{place}: {error['msg']} (got {harmless(repr(error['input']), 80)})"


def what_is_read(config: Config) -> dict[str, Any]:
    """The settings that a run with this configuration reads, nested: `build_config` makes the same
    configuration of them."""
    nested: dict[str, Any] = {}
    whole = config.model_dump(mode="json")
    for name in leaf_settings():
        if name not in settings_read(config):
            continue
        *path, last = name.split(".")
        place, value = nested, whole
        for part in path:
            place, value = place.setdefault(part, {}), value[part]
        place[last] = value[last]
    return nested


def settings_for(name: str, given: Mapping[str, Any], preset: str = "default") -> dict[str, Any]:
    """Of settings that several methods share, those that this method can read under a preset.

    Names that no method knows are kept: validation refuses them.
    """
    if name not in METHODS:
        return dict(given)
    every = {s for m in METHODS for s in settings_readable(m)}
    foreign = every - settings_readable(name, preset)
    return _without(given, foreign, "")


def _without(given: Mapping[str, Any], names: set[str], prefix: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, Mapping):
            kept = _without(value, names, f"{prefix}{key}.")
            if kept or not value:
                out[key] = kept
        elif f"{prefix}{key}" not in names:
            out[key] = value
    return out


def _check(config: Config) -> None:
    """Combinations of settings that each are fine alone.

    Raises:
        BadInputError: saying which.
    """
    if config.privacy.enabled:
        _check_privacy(config)
    order = config.population.order
    if order != "auto" and order > config.model.latent:
        raise BadInputError(
            f"population.order: {order} does not fit a latent of {config.model.latent} dimensions"
            " (model.latent)"
        )
    prototypes, rounds = config.prototypes, config.federation.rounds
    if config.prototypes.kind == "anchored":
        if config.prototypes_start >= rounds:
            auto = prototypes.start_round == "auto"
            raise BadInputError(
                f"federation.rounds: {rounds} leaves no round in which the anchors act, which are"
                f" fitted after round {config.prototypes_start}; give 2 rounds or more, or"
                " --method fedvpl, which has none"
                if auto
                else f"prototypes.start_round: {config.prototypes_start} of {rounds} rounds leaves"
                " none in which the anchors act"
            )
        if config.federation.protocol == "single-pair":
            raise BadInputError(
                "federation.protocol: single-pair has no context that could weigh anchors"
            )
    if config.objective.kl_schedule == "cyclical" and config.objective.kl_warmup_rounds < 2:
        raise BadInputError("objective.kl_warmup_rounds: a cycle needs at least 2 rounds")
    if prototypes.kind in ("learned", "fixed"):
        if prototypes.modes == "auto":
            raise BadInputError(
                "prototypes.modes: orthogonal prototypes need a number of modes, not auto"
            )
        if prototypes.modes > config.model.latent:
            raise BadInputError(
                f"prototypes.modes: {prototypes.modes} orthogonal prototypes do not fit a latent of"
                f" {config.model.latent} dimensions"
            )
    if isinstance(prototypes.modes, int) and prototypes.modes < 1:
        raise BadInputError("prototypes.modes: at least 1")


def _check_privacy(config: Config) -> None:
    """Differential privacy is of sums over clients, with what they depend on fixed beforehand.

    Raises:
        BadInputError: saying which setting has to be another.
    """
    f, p = config.federation, config.population
    if config.entry.summed:
        wrong = [
            (
                p.structure == "directions",
                "population.structure must be directions: groups are found by clusters of clients,"
                " asked for again and again",
            ),
            (
                "auto" not in (p.order, p.ridge),
                "population.order and population.ridge must be numbers: finding them reads the"
                " clients' choices again and again",
            ),
        ]
    else:
        wrong = [
            (
                config.prior.kind == "components",
                "prior.kind must be components: others show every client's posterior",
            ),
            (
                config.prototypes.modes != "auto",
                "prototypes.modes must be a number: finding it reads the clients' choices",
            ),
        ]
    wrong += [
        (
            config.data.public is not None,
            "data.public must name public pairs, by which the features are whitened",
        ),
        (
            f.aggregator == "mean",
            "federation.aggregator must be mean: a noised sum is all that is known",
        ),
        (
            f.aggregation == "uniform",
            "federation.aggregation must be uniform: the number of pairs is private",
        ),
    ]
    for fine, why in wrong:
        if not fine:
            raise BadInputError(f"privacy: {why}")
