"""Plans: layers of settings, the quick form, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fedvpa.errors import BadInputError
from fedvpa.experiment.plan import read_plan

PLAN = {
    "seeds": [0, 1],
    "tuned": "tuned.yaml",
    "rows": {"fedvpl": {}, "fast": {"method": "fedvpl", "federation": {"learning_rate": 0.1}},
    "fedavg-btl": {}},
    "settings": {
        "small": {
            "train": {"data": {"source": "d/x", "clients": 6}, "model": {"latent": 4}},
            "rows": ["fedvpl", "fast", "fedavg-btl"],
        },
        "built-in": {"train": {"data": {"source": "personas"}}, "rows": ["fedvpl"], "seeds": [7]},
    },
    "quick": {"seeds": [3], "settings": ["small"], "rows": ["fast"],
    "train": {"federation": {"rounds": 2}}},
}  # fmt: skip


def write(folder: Path, plan: object) -> Path:
    (folder / "tuned.yaml").write_text(
        yaml.safe_dump({"fedvpl": {"federation": {"learning_rate": 0.5, "local_steps": 3}}})
    )
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return folder / "plan.yaml"


def test_a_row_wins_over_tuned_settings_and_these_over_the_settings_own(tmp_path: Path) -> None:
    small, built_in = read_plan(write(tmp_path, PLAN), Path("/data"))
    assert small.rows["fedvpl"]["federation"] == {"learning_rate": 0.5, "local_steps": 3}
    assert small.rows["fast"]["federation"] == {"learning_rate": 0.1, "local_steps": 3}
    assert small.rows["fast"]["data"] == {"source": "/data/d/x", "clients": 6}
    assert (
        "model" not in small.rows["fedavg-btl"] or "latent" not in small.rows["fedavg-btl"]["model"]
    )
    assert built_in.rows["fedvpl"]["data"]["source"] == "personas"
    assert (small.seeds, built_in.seeds) == ([0, 1], [7])


def test_the_quick_form_is_a_part_of_the_plan(tmp_path: Path) -> None:
    (only,) = read_plan(write(tmp_path, PLAN), None, quick=True)
    assert (only.name, list(only.rows), only.seeds) == ("small", ["fast"], [3])
    assert only.rows["fast"]["federation"]["rounds"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": {"fedvlp": {}}}, "asks for row"),
        (
            {"rows": {**PLAN["rows"], "fast": {"method": "fedvlp"}}},
            "row 'fast': unknown method 'fedvlp' \\(known: fedvpa-gp",
        ),
        ({"seed": [0]}, "seed: unknown setting \\(known here: seeds"),
        (
            {"rows": {**PLAN["rows"], "fast": {"method": "fedvpl", "federation": {"speed": 1}}}},
            "federation.speed: unknown",
        ),
        ({"settings": {"small": {"rows": []}}}, "settings.small.rows"),
        ({"quick": {"settings": ["large"]}}, "quick.settings names large"),
    ],
)
def test_mistakes_in_a_plan_are_named(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match=message):
        read_plan(write(tmp_path, {**PLAN, **change}), quick="quick" in change)


def test_the_benchmark_plan_is_a_good_one() -> None:
    plan = read_plan(Path(__file__).parents[2] / "benchmarks/plan.yaml", Path("/data"))
    assert {"hh-40", "hh-120", "hh-200", "axes-32", "objectives-40"} <= {c.name for c in plan}
    assert all(len(c.seeds) >= (3 if c.name == "convarg" else 5) for c in plan)
