"""Shared fixtures: a tiny random Llama with a word-level tokenizer, and synthetic clients in
feature space."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

# before anything is imported that reads it: names that are no folder are not looked for on the Hub
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from hypothesis import settings as hypothesis_settings

from fedvpa.federated.batch import ClientStore, build_store
from fedvpa.federated.random import stream

hypothesis_settings.register_profile("quick", max_examples=50)
hypothesis_settings.register_profile("soak", max_examples=5000)
hypothesis_settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WORDS = [
    "yes",
    "no",
    "tea",
    "is",
    "good",
    "bad",
    "very",
    "help",
    "harm",
    "please",
    "stop",
    "ask",
    "a",
    "friend",
    ".",
]


@pytest.fixture(autouse=True)
def _quiet_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("FEDVPA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    # a command that is run in this process sets the level of our log for good
    monkeypatch.setattr(logging.getLogger("fedvpa"), "level", logging.NOTSET)


@pytest.fixture(autouse=True, scope="session")
def _same_arithmetic() -> Iterator[None]:
    """Models compute in float32 unless a test says otherwise, also where bfloat16 is native: the
    same results everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("fedvpa.features.loading", "fedvpa.features.backbone"):
            patch.setattr(f"{module}.preferred_dtype", lambda device: torch.float32, raising=False)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a random two-layer Llama of width 32 and a tokenizer with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<end>", "<user>", "<assistant>", "<system>"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def synthetic_store(
    clients: int = 6,
    pairs: int = 12,
    inputs: int = 8,
    groups: int = 2,
    seed: int = 0,
    ragged: bool = True,
    sizes: Sequence[int] | None = None,
) -> ClientStore:
    """Clients of opposed groups: the chosen response is the one that the group's own direction
    prefers. `sizes`: their numbers of pairs, if these differ by more than `ragged` makes them."""
    generator = stream(seed, "synthetic")
    directions = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator))[0]
    differences, commons, orders, names = [], [], [], []
    for k in range(clients):
        n = pairs - (k % 3 if ragged else 0) if sizes is None else sizes[k]
        x = torch.randn(n, inputs, generator=generator)
        group = k % groups
        direction = directions[group // 2] * (1 if group % 2 == 0 else -1)
        x = x * (x @ direction).sign().unsqueeze(-1)
        differences.append(x)
        commons.append(torch.randn(n, inputs, generator=generator))
        orders.append(torch.where(torch.rand(n, generator=generator) < 0.5, 1.0, -1.0))
        names.append(f"client-{k}")
    return build_store(
        names, [f"group-{k % groups}" for k in range(clients)], differences, commons, orders
    )


@contextmanager
def endpoint(
    answer: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A chat endpoint on loopback: its address, and what it has been asked. `answer` gives
    status and body of a reply."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the base class looks for this name
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(request)
            status, body = answer(request)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def pair_file(tmp_path: Path) -> Path:
    """A folder of two groups, `kind` and `blunt`, with train.jsonl and test.jsonl of word-level
    pairs."""
    return write_groups(tmp_path / "data")


def write_groups(folder: Path, train: int = 60, test: int = 24) -> Path:
    """Two groups that want opposite replies."""
    from itertools import product

    prompts = [f"{a} {b} {c}" for a, b, c in product(WORDS[:5], WORDS[5:10], WORDS[10:13])]
    for group, sign in (("kind", 1), ("blunt", -1)):
        for split, rows in (("train", prompts[:train]), ("test", prompts[-test:])):
            lines = []
            for i, prompt in enumerate(rows):
                good, bad = f"please help {WORDS[i % 5]} friend", f"stop harm {WORDS[i % 4]} bad"
                chosen, rejected = (good, bad) if sign > 0 else (bad, good)
                lines.append(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
            path = folder / group / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a PostgreSQL server of this session's own, which listens at a socket in a folder."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        needed = os.environ.get("FEDVPA_ALL_SERVICES")
        (pytest.fail if needed else pytest.skip)(
            "PostgreSQL is not installed: apt-get install postgresql"
        )
    # its user must reach the folder, and must not be root
    folder = Path(tempfile.mkdtemp(prefix="fedvpa-pg-", dir="/tmp"))
    run = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if run:
        shutil.chown(folder, "postgres")
    data, user = str(folder / "data"), "postgres"
    bin_ = found[-1].parent
    quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(
        [*run, str(bin_ / "initdb"), "-D", data, "-U", user, "-A", "trust"], check=True, **quiet
    )
    options = f"-k {folder} -c listen_addresses="
    control = [*run, str(bin_ / "pg_ctl"), "-D", data, "-w"]
    subprocess.run([*control, "-o", options, "start"], check=True, **quiet)
    try:
        yield f"postgresql://{user}@/postgres?host={folder}"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=True, **quiet)
        shutil.rmtree(folder)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--write-golden`` pins the trajectories anew."""
    parser.addoption("--write-golden", action="store_true", help="pin the golden trajectories anew")
