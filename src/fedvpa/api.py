"""The functions of ``import fedvpa``: train and evaluate from Python, as the commands do."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from fedvpa.config import Config, build_config, leaf_settings, merged, read_yaml, short_names
from fedvpa.console import Reporter
from fedvpa.data.memory import pairs_from, write_pairs
from fedvpa.errors import BadInputError
from fedvpa.experiment.evaluate import Evaluation
from fedvpa.experiment.evaluate import evaluate as evaluate_run
from fedvpa.experiment.run import RunPaths, load_config
from fedvpa.experiment.subjects import EvaluationSettings
from fedvpa.experiment.train import KEPT, TrainResult, told
from fedvpa.experiment.train import train as train_config
from fedvpa.files import claim


def train(
    data: Any = None,
    out: str | Path | None = None,
    *,
    config: Mapping[str, Any] | Config | str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> TrainResult:
    """Train a method and leave a run in a folder, as ``fedvpa train`` does.

    Args:
        data: comparisons: a path, ``"personas"``, a list of records or of `PreferencePair`, or a
            `datasets.Dataset`, or a `pandas.DataFrame`; what is in memory is written to
            ``OUT/data/train.jsonl``.
        out: folder of the run; it must be new or empty, unless the run is resumed.
        config: settings as nested dicts, a `Config`, or a YAML file.
        resume: continue the interrupted run in `out`, with its own settings.
        progress: show progress on standard error.
        settings: settings by their short name, as ``rounds=30``, or by section, as
            ``prior={"kind": "peers"}``; ``fedvpa train --help-all`` lists them.

    Returns:
        The run: its folder, configuration, history (a row per round), and seconds.

    Raises:
        BadInputError: a setting that does not exist or would not be read, unusable data, or a
            folder in use.
        NonFiniteUpdateError: a client's update holds NaN or Inf; the run can be resumed.

    Example:
        >>> import fedvpa, tempfile
        >>> fedvpa.train("personas", tempfile.mkdtemp(), roundz=3)
        Traceback (most recent call last):
        ...
        fedvpa.errors.BadInputError: train(roundz=...): no such setting (did you mean rounds?)
    """
    if resume:
        if out is None or data is not None or settings or config is not None:
            raise BadInputError("train(resume=True): name the folder, out=..., and nothing else")
        built = load_config(RunPaths(Path(out))).model_copy(update={"out": str(out)})
    else:
        given = merged(_layer(config), _by_section(settings))
        if out is not None:
            given["out"] = str(out)
        built = build_config(_with_data(given, data))
    reporter = Reporter(quiet=not progress)
    with ExitStack() as shown:
        on_features = shown.enter_context(reporter.texts())
        bar = shown.enter_context(reporter.progress("rounds"))
        return train_config(
            built, resume=resume, on_features=on_features,
            on_round=lambda done, total, row: bar.update(
                done, total, told(row, built.privacy.delta)
            ),
        )  # fmt: skip


def evaluate(
    run: TrainResult | str | Path,
    data: Any = None,
    *,
    split: str | None = None,
    unseen: Any = None,
    clients: int = 0,
    context: int = 32,
    repeats: int = 4,
    seed: int = 0,
    on_bad_record: Literal["few", "error", "skip"] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate a run on unseen clients, and on its own where it holds their pairs.

    No target pair is in any context or training set; see ``docs/evaluation.md`` for the keys of
    `Evaluation.results`.

    Args:
        run: what `train` returned, or the run's folder.
        data: evaluation pairs as for `train`; None: new pairs of a source that generates them.
        split: only files called ``SPLIT.*``.
        unseen: other users, who were not trained on, as `data` (None: those in `data`).
        clients: unseen clients (0: every new id, or ten clients where there are no ids).
        context: context pairs of a client, at most (and at most half of its pairs).
        repeats: random divisions into context and targets.
        seed: seed of these divisions.
        on_bad_record: as for `read_pairs` (None: as in training).
        progress: show progress on standard error.

    Raises:
        BadInputError: no finished run there, or unusable evaluation data.

    Example:
        >>> import fedvpa
        >>> found = fedvpa.evaluate(run, test_pairs, clients=2, context=4, progress=False)
        >>> sorted(found.results["accuracy"]["own"])
        ['high', 'low', 'mean', 'n']
    """
    root = run.root if isinstance(run, TrainResult) else Path(run)
    settings = EvaluationSettings(
        _named(data, "data", root), split, clients, context, repeats, seed, on_bad_record,
        _named(unseen, "unseen", root),
    )  # fmt: skip
    with Reporter(quiet=not progress).texts() as on_features:
        return evaluate_run(str(root), settings, on_features)


def _named(data: Any, argument: str, root: Path) -> str | None:
    """The source's name; pairs in memory are written into the run's folder."""
    if data is None or isinstance(data, str | Path):
        return None if data is None else str(data)
    pairs = pairs_from(data, f"evaluate({argument})")
    keys = hashlib.sha256("".join(p.content_key() for p in pairs).encode()).hexdigest()
    file = root / "data" / f"evaluation-{keys[:12]}.jsonl"
    write_pairs(pairs, file)
    return str(file)


def _layer(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, str | Path):
        return read_yaml(Path(config))
    if isinstance(config, Config):
        return config.model_dump(exclude_unset=True)
    if not isinstance(config, Mapping):
        raise BadInputError(
            f"train(config): is a {type(config).__name__}; give nested settings, a fedvpa.Config,"
            " or the path of a YAML file"
        )
    return dict(config)


def _by_section(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings from keywords: short names, or whole sections."""
    short = {flag.replace("-", "_"): name for name, flag in short_names().items()}
    known = {*short, *Config.model_fields, *leaf_settings()}
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise BadInputError(f"train({key}=...): no such setting{hint}")
        dotted = short.get(key, key)
        leaf: Any = value
        for part in reversed(dotted.split(".")):
            leaf = {part: leaf}
        nested = merged(nested, leaf)
    return nested


def _with_data(given: dict[str, Any], data: Any) -> dict[str, Any]:
    """The settings with the data's source; pairs in memory are written into the run's folder."""
    if data is None:
        return given
    source = data
    if not isinstance(data, str | Path):
        pairs = pairs_from(data, "train(data)")
        if not pairs:
            raise BadInputError("train(data): holds no pairs")
        out = Path(given.get("out", leaf_settings()["out"].default))
        claim(out, "continue an interrupted run with resume=True, or choose another out")
        build_config(merged(given, {"data": {"source": "personas"}}))  # refuse before writing
        source = out / KEPT / "train.jsonl"
        write_pairs(pairs, source)
    return merged(given, {"data": {"source": str(source)}})
