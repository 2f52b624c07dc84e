"""Names are data: markup, mathematics, scripts, paths and formats in the names of clients, groups
and preferences change nothing on a terminal, in a page, in a drawing, a path or a certificate."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from fedvpa.cli.main import main
from fedvpa.console import Reporter
from fedvpa.data.reading import read_pairs
from fedvpa.errors import BadInputError, RecordError
from fedvpa.evaluation import plots
from fedvpa.experiment.preferences import preference_names
from fedvpa.network.project import init_project
from fedvpa.types import Posterior
from tests.conftest import WORDS
from tests.corpus.files import lines

HOSTILE = [
    "[/bold]", "[red]x", r"$\frac{1", "$x$", "<script>alert(1)</script>", "&amp;", "../../x",
    "名前", "_hidden", "%s{0}", "-rf", "CON", "a/b\\c", '"quoted"', "'", "x" * 199, "neutral",
    "base",
]  # fmt: skip
UNREADABLE = ["a\nb", "a\x1b[2Jb", "a\u202eb", "a\0b", "x" * 201, "\ud800"]
FLAGS = ["--layer", "2", "--dtype", "float32", "--rounds", "4", "--local-steps", "2", "--inputs",
         "4", "--latent", "4", "--method", "fedvpl+mix", "--modes", "2", "--quiet"]  # fmt: skip


def write(file: Path, first: int) -> Path:
    """Two clients of every hostile name in a group of every hostile name."""
    rows = [
        {"prompt": f"{WORDS[i]} {WORDS[(u + first) % 13]}", "chosen": f"yes {WORDS[u % 7]} {first}",
         "rejected": f"no {WORDS[i]} {u}", "client_id": name, "group": HOSTILE[4 * (u // 9)]}
        for u, name in enumerate(HOSTILE) for i in range(6)
    ]  # fmt: skip
    file.write_bytes(lines(*rows))
    return file


def test_hostile_names_pass_through_training_and_every_page(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = write(tmp_path / "train.jsonl", 0), write(tmp_path / "test.jsonl", 3)
    assert main(["data", "inspect", str(train)]) == 0
    home = tmp_path / "here"
    run = home / "[/bold] $x$ <i>"
    command = ["--data", str(train), "--backbone", str(tiny_model)]
    assert main(["train", *command, *FLAGS, "--out", str(run)]) == 0
    assert main(["evaluate", str(run), "--data", str(test), "--context", "2"]) == 0
    assert main(["preferences", str(run), "--top", "1"]) == 0
    many = ["--methods", "fedvpl,fedavg-btl", "--seeds", "0", "--test-data", str(test)]
    assert main(["compare", *command, *many, *FLAGS[:10], "--out", str(home / "compare")]) == 0
    assert "Traceback" not in capsys.readouterr().err
    pages = [run / "report.html", home / "compare" / "report.html"]
    for page in pages:
        text = page.read_text()
        assert "<script>" not in text
        assert "<i>" not in text
        for part in text.split("<svg")[1:]:
            ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in pages[0].read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"train.jsonl", "test.jsonl", "here"}


@pytest.mark.parametrize("name", UNREADABLE)
def test_names_that_cannot_be_shown_are_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    record = {"prompt": "tea?", "chosen": "yes", "rejected": "no", "client_id": name}
    file.write_text(json.dumps(record) + "\n")
    with pytest.raises(RecordError, match=r"p.jsonl:1: .*'client_id'"):
        read_pairs(file)


def test_tables_and_bars_take_names_for_names(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(quiet=False)
    reporter.table("[/bold] title", ["[/i]", *HOSTILE[:2]], [HOSTILE[:3]])
    with reporter.progress("round 0: [/bold]") as bar, reporter.stages() as stage:
        bar.update(1, 1, "[/red]")
        stage("[/bold]", 1, 1, "[x]")
    shown = capsys.readouterr().err
    for text in ("[/bold] title", "[/i]", r"$\frac{1", "round 0: [/bold]", "[/red]"):
        assert text in shown


def test_names_are_drawn_as_they_are() -> None:
    many = len(HOSTILE)
    posterior = Posterior(torch.randn(many, 3), torch.zeros(many, 3))
    figure = plots.latent_map(
        posterior, None, None, torch.arange(many), torch.zeros(0, dtype=torch.long), HOSTILE
    )
    drawn = ElementTree.fromstring(plots.svg(figure))
    texts = {"".join(t.itertext()).strip() for t in drawn.iter("{http://www.w3.org/2000/svg}text")}
    for name in HOSTILE:
        if len(name) < 60:
            assert any(name in text for text in texts), name


def test_preferences_have_names_of_their_own_that_mean_nothing_else() -> None:
    names = preference_names([*HOSTILE, None, "a", "a", "a-1", "prototype-3", None])
    assert len(set(names)) == len(names)
    assert not {"neutral", "base"} & set(names)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"clients": ["a/b"]}, "has letters, digits"),
        ({"clients": ["x" * 121]}, "120 characters at most, not 121"),
        ({"clients": ["[/bold]"]}, "has letters, digits"),
        ({"clients": ["a"], "host": "a b"}, "not the name or the address of a machine"),
        ({"clients": ["a"], "host": "x" * 64}, "not the name or the address of a machine"),
        ({"clients": ["a"], "port": 0}, "between 1 and 65535"),
        ({"clients": ["a"], "port": 99999}, "between 1 and 65535"),
        ({"clients": ["a"], "port": -1}, "between 1 and 65535"),
    ],
)
def test_a_project_with_names_that_cannot_be_is_not_begun(
    given: dict[str, object], says: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match=says):
        init_project(tmp_path / "project", **given)  # type: ignore[arg-type]
    assert not (tmp_path / "project").exists()


def test_long_names_and_names_of_other_scripts_are_certified(tmp_path: Path) -> None:
    from cryptography import x509

    names = ["x" * 120, "ü.名前"]
    folders = init_project(tmp_path / "project", names, host="ü.example")
    assert [folder.name for folder in folders] == names
    raw = (tmp_path / "project" / "certificates" / "server.crt").read_bytes()
    found = x509.load_pem_x509_certificate(raw).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert "xn--tda.example" in found.value.get_values_for_type(x509.DNSName)
    with pytest.raises(BadInputError, match="holds a backslash"):
        init_project(tmp_path / "a\\b", ["a"])
