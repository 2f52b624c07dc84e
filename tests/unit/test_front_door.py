"""The command line's first second, its help, the public interface, and the house's own limits."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import fedvpa
from fedvpa import BadInputError, PreferencePair, build_config
from fedvpa.api import _by_section, _layer
from fedvpa.cli.main import COMMANDS, Command, build_parser, main
from fedvpa.cli.options import kebab
from fedvpa.config import BASIC, leaf_settings, settings_readable
from fedvpa.data.memory import items_from, pairs_from
from fedvpa.methods import METHODS
from fedvpa.parts import AGGREGATORS, HEADS, JUDGES, PRIORS, SOURCES, builder
from tests.conftest import write_groups

ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch", "transformers", "peft", "trl", "datasets", "matplotlib", "scipy", "sklearn", "flwr",
    "jaxtyping", "pandas", "safetensors",
}  # fmt: skip
LOADED = """
import json, sys
from fedvpa.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as stopped:
    code = stopped.code
json.dump([code, sorted({name.partition(".")[0] for name in sys.modules})], sys.stderr)
"""


def loaded_by(*arguments: str) -> tuple[int, set[str]]:
    """Exit code of a command line, and the packages that it has imported."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments], capture_output=True, text=True, check=True
    )
    code, names = json.loads(done.stderr.splitlines()[-1])
    return code or 0, set(names)


def paths() -> list[list[str]]:
    return [
        [name, *more]
        for name, entry in COMMANDS.items()
        for more in ([[]] if isinstance(entry, Command) else [[w] for w in entry.commands])
    ]


def test_the_first_help_imports_nothing_but_the_parser() -> None:
    code, names = loaded_by("--help")
    assert code == 0
    assert not names & (HEAVY | {"pydantic", "yaml", "rich", "numpy"})


@pytest.mark.parametrize("words", [["train"], ["winrate"], ["federation", "init"]], ids=" ".join)
def test_a_command_s_help_imports_settings_alone(words: list[str]) -> None:
    code, names = loaded_by(*words, "--help")
    assert code == 0
    assert "pydantic" in names
    assert not names & (HEAVY | {"rich", "numpy"})


def test_wrong_arguments_and_what_needs_no_tensors_import_no_torch(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}) + "\n")
    for expected, arguments in (
        (2, ["train", "--rounds", "0"]),
        (2, ["train", "--method", "fedvpl", "--prior.weights", "gumbel"]),
        (2, ["winrate", "policy", "--prompts", "p", "--out", "o", "--judge", "gpt"]),
        (2, ["compare", "--methods", "fedvlp"]),
        (0, ["data", "inspect", str(pairs), "--quiet"]),
        (0, ["privacy", "plan", "--epsilon", "8", "--clients", "1000", "--cohort", "100",
             "--rounds", "2", "--quiet"]),
    ):  # fmt: skip
        code, names = loaded_by(*arguments)
        assert code == expected, arguments
        assert not names & (HEAVY - {"scipy"}), arguments


def test_training_imports_no_trl_no_peft_and_no_matplotlib(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = write_groups(tmp_path / "data")
    code, names = loaded_by(
        "train", "--data", str(data), "--split", "train", "--backbone", str(tiny_model), "--layer",
        "2", "--clients", "4", "--rounds", "2", "--inputs", "8", "--method", "fedvpl", "--quiet",
        "--out", str(tmp_path / "run"), "--dtype", "float32",
    )  # fmt: skip
    assert code == 0
    assert "torch" in names
    assert not names & {"trl", "peft", "matplotlib", "datasets", "flwr"}


@pytest.mark.parametrize("words", paths(), ids=" ".join)
def test_every_command_has_a_help_in_which_every_flag_is_explained(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "None)" not in out
    for line in out.splitlines():  # one spelling
        assert not (line.strip().startswith("--") and "_" in line.split()[0]), line


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        main(list(arguments))
    return capsys.readouterr().out


def test_help_shows_what_the_method_reads_with_its_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    default = shown(capsys, "train", "--help-all")
    assert "(default: 128)" in default[default.rindex("--inputs") :][:200]
    anchors = shown(capsys, "train", "--method", "fedvpl+anchors", "--help-all")
    assert "(default: 0.03)" in anchors[anchors.rindex("--reward-decay") :][:200]
    assert "--selectors" not in default
    assert "--server-learning-rate" not in shown(capsys, "train", "--help")
    other = shown(capsys, "train", "--method", "fedbiscuit", "--help-all")
    assert "--selectors" in other
    assert "--latent LATENT" not in other
    for name in ("train", "embed"):
        basic, everything = shown(capsys, name, "--help"), shown(capsys, name, "--help-all")
        assert len(basic) < 0.75 * len(everything)
    assert "privacy" not in shown(capsys, "embed", "--help-all")


def test_flags_have_one_spelling_and_the_names_of_settings_still_work() -> None:
    assert kebab(["--federation.local_steps=3", "--on_bad", "x_y"]) == [
        "--federation.local-steps=3", "--on_bad", "x_y",
    ]  # fmt: skip
    words = ["train", "--local-steps", "3", "--federation.server-learning-rate", "0.5"]
    arguments = build_parser(words).parse_args(words)
    assert vars(arguments)["federation.local_steps"] == "3"
    assert vars(arguments)["federation.server_learning_rate"] == "0.5"


def test_basic_settings_exist_and_every_setting_is_read_by_some_method() -> None:
    settings = leaf_settings()
    assert set(BASIC) <= settings.keys()
    assert set().union(*(settings_readable(m) for m in METHODS)) == settings.keys()
    assert all(info.description for info in settings.values())


@pytest.mark.parametrize("table", [PRIORS, HEADS, AGGREGATORS, SOURCES, JUDGES])
def test_every_entry_of_a_table_can_be_built_and_reads_settings_that_exist(table: dict) -> None:  # type: ignore[type-arg]
    for entry in table.values():
        assert callable(builder(entry))
        for name in entry.reads:
            assert [s for s in leaf_settings() if s.startswith(name.rstrip("*"))], name


def test_the_public_interface_is_there_and_imports_nothing_by_itself() -> None:
    assert set(fedvpa.__all__) == set(dir(fedvpa))
    for name in fedvpa.__all__:
        assert getattr(fedvpa, name).__doc__ or name == "__version__"
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        fedvpa.trian  # noqa: B018
    code = "import sys, fedvpa; print(int('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_settings_are_given_by_name_and_wrong_arguments_are_told_by_name(tmp_path: Path) -> None:
    assert _by_section({"rounds": 3, "prior": {"kind": "peers"}, "local_steps": 2}) == {
        "federation": {"rounds": 3, "local_steps": 2}, "prior": {"kind": "peers"},
    }  # fmt: skip
    with pytest.raises(BadInputError, match=r"train\(round=\.\.\.\): no such setting \(did you"):
        fedvpa.train("personas", tmp_path / "r", round=3)
    with pytest.raises(BadInputError, match=r"train\(data\)\[1\]: is a str"):
        fedvpa.train([{"prompt": "a", "chosen": "b", "rejected": "c"}, "text"], tmp_path / "r")
    with pytest.raises(BadInputError, match=r"items\[0\]: is a str; a response needs its prompt"):
        items_from(["text"])
    with pytest.raises(BadInputError, match="items: is a str; give a list"):
        items_from("text")
    with pytest.raises(BadInputError, match="pairs: is a int"):
        pairs_from(3)
    with pytest.raises(BadInputError, match=r"train\(data\): holds no pairs"):
        fedvpa.train([], tmp_path / "r")
    with pytest.raises(BadInputError, match=r"train\(config\): is a int"):
        _layer(3)
    assert not (tmp_path / "r").exists()


def test_pairs_come_from_records_pairs_and_datasets() -> None:
    from datasets import Dataset

    records = [
        {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No.", "client_id": "ann"},
        {"prompt": "Rice?", "chosen": "No.", "rejected": "Yes.", "client_id": "bob"},
    ]
    pairs = pairs_from(records)
    assert [p.client_id for p in pairs] == ["ann", "bob"]
    assert all(isinstance(p, PreferencePair) for p in pairs)
    table = pytest.importorskip("pandas").DataFrame(records)
    assert [p.client_id for p in pairs_from(table)] == ["ann", "bob"]
    again = pairs_from(Dataset.from_list(records))
    assert [p.content_key() for p in again] == [p.content_key() for p in pairs_from(pairs)]


def test_a_setting_that_is_not_read_is_traced_to_the_choice_that_matters() -> None:
    with pytest.raises(BadInputError, match=r"prior\.weights is not read: prior\.kind is gaussian"):
        build_config({"method": "fedvpl", "prior": {"kind": "gaussian", "temperature": 2}})


def test_strangers_pairs_are_not_dealt_to_clients_without_a_group(tmp_path: Path) -> None:
    from fedvpa.data.partition import ClientPairs
    from fedvpa.data.sources import source_of

    file = tmp_path / "test.jsonl"
    record = {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}
    file.write_text(json.dumps(record | {"client_id": "new"}) + "\n")
    source = source_of(build_config({"data": {"source": str(file)}}).data)
    mine = pairs_from([record | {"prompt": "Milk?"}])
    clients = [ClientPairs("client-0000", None, tuple(mine))]
    assert source.held_out(0, clients) == []
    file.write_text(json.dumps(record) + "\n")
    assert source.held_out(0, clients) == []
    file.write_text(json.dumps(record | {"group": "kind"}) + "\n")
    (row,) = source.held_out(0, [replace(clients[0], group="kind")])
    assert len(row.pairs) == 1


def test_a_config_that_was_built_can_be_given_again() -> None:
    config = build_config({"method": "fedvpl", "federation": {"rounds": 3}})
    assert build_config(config.model_dump(exclude_unset=True)) == config


def test_no_function_is_longer_than_60_lines_and_no_file_than_400() -> None:
    long = []
    for file in (ROOT / "src").rglob("*.py"):
        text = file.read_text()
        if len(text.splitlines()) > 400:
            long.append(f"{file.name}: {len(text.splitlines())}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60:
                    long.append(f"{file.name}:{node.name}: {lines}")
    assert not long
