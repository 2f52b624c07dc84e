r"""Frozen backbone: texts to features h(x, y) in R^H (docs/equations.md).

A causal model reads each prompt once for all its responses: one row holds the prompt and, behind
it, every response, and an attention mask lets a response see the prompt and itself alone, at the
positions it would have had in a row of its own. That is a shared key-value cache without the cache.
Only the layers that are asked for are run. Models that cannot take such a mask (checked on load, by
comparing with plain rows), and bidirectional encoders, read prompt + response rows.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.errors import BadInputError, RunError
from fedvpa.features.chat import ChatFormat, Prepared
from fedvpa.features.loading import load_model, preferred_dtype
from fedvpa.records import Item, Message, Progress

logger = logging.getLogger("fedvpa")

Pooling = Literal["last", "mean"]


class Tap(NamedTuple):
    """Where a feature is read: the residual stream after block `layer` (1 is the first), pooled
    over the response."""

    layer: int
    pooling: Pooling


@dataclass(frozen=True)
class _Row:
    """Token ids of a prompt and of responses to it; `index` says which items these are."""

    prompt: list[int]
    responses: list[list[int]]
    index: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


class Backbone:
    """A frozen language model as feature extractor."""

    def __init__(
        self,
        name: str,
        *,
        max_prompt_tokens: int = 512,
        max_response_tokens: int = 256,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        thinking: bool = False,
    ) -> None:
        self.dtype = dtype if dtype is not None else preferred_dtype(device)
        loaded = load_model(name, self.dtype, device)
        self.name, self.revision = loaded.name, loaded.revision
        self.device, self._module = device, loaded.module
        self.format = ChatFormat(loaded.tokenizer, loaded.name, thinking=thinking)
        config: Any = loaded.module.config
        self.hidden_size, self.num_layers = int(config.hidden_size), int(config.num_hidden_layers)
        self.causal = not hasattr(loaded.module, "encoder")
        positions = getattr(config, "max_position_embeddings", None) or 1 << 30
        self.max_response_tokens = min(max_response_tokens, positions // 2)
        self.max_prompt_tokens = min(max_prompt_tokens, positions - self.max_response_tokens - 2)
        self._blocks = self._find_blocks()
        self.packed = self.causal and self._packing_is_exact()

    @property
    def template_hash(self) -> str:
        """Hash of how texts are prepared, of the chat template and of the limits: what decides
        which tokens are read."""
        text = f"{self.format.identity}|{self.max_prompt_tokens}|{self.max_response_tokens}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def signature(self, tap: Tap) -> str:
        """Names everything but the text that decides a feature's value."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.revision}|{self.template_hash}|{kind}|layer={tap.layer}|pool={tap.pooling}"

    def check(self, taps: Sequence[Tap]) -> None:
        """Refuse a layer that the model does not have.

        Raises:
            BadInputError: naming the layer and the model's own range.
        """
        for tap in taps:
            if not 1 <= tap.layer <= self.num_layers:
                raise BadInputError(
                    f"features.layer: {tap.layer} is not a layer of {self.name}, which has 1 to"
                    f" {self.num_layers}"
                )

    @torch.inference_mode()
    def encode(
        self,
        items: Sequence[Item],
        taps: Sequence[Tap],
        *,
        token_budget: int = 4096,
        on_batch: Callable[[list[int], Tensor], None] | None = None,
        progress: Progress | None = None,
        prepared: Sequence[Prepared] | None = None,
    ) -> Float[Tensor, "n t h"]:
        """Features of every item at every tap, in float32.

        Batches hold rows of like length, at most `token_budget` tokens with padding. `on_batch`
        receives the items' indices and features [b, t, h] as soon as they are known, so that a
        cache loses little to an interruption. `prepared` is what `prepare` has made of the items.

        Raises:
            BadInputError: a tap that the model does not have, or a prompt that its chat template
                refuses.
            RunError: the model gave NaN or Inf, naming the response.
        """
        self.check(taps)
        result = torch.empty(len(items), len(taps), self.hidden_size)
        rows = self._rows(self.prepare(items) if prepared is None else prepared)
        done, tokens, start = 0, 0, time.perf_counter()
        for batch in _batches(rows, token_budget):
            hidden = self._forward(batch, sorted({t.layer for t in taps}))
            index: list[int] = []
            features: list[Tensor] = []
            for r, row in enumerate(batch):
                begin = len(row.prompt)
                for item, response in zip(row.index, row.responses):
                    end = begin + len(response)
                    features.append(
                        torch.stack([_pool(hidden[t.layer][r, begin:end], t.pooling) for t in taps])
                    )
                    index.append(item)
                    begin = end
            block = torch.stack(features)
            finite = block.isfinite().flatten(1).all(1)
            if not finite.all():
                bad = index[int((~finite).nonzero()[0])]
                raise RunError(
                    f"{self.name} gave NaN or Inf for response {items[bad].response[:60]!r}; try"
                    " another dtype"
                )
            result[index] = block
            if on_batch is not None:
                on_batch(index, block)
            done += len(index)
            tokens += sum(row.length for row in batch)
            if progress is not None:
                progress(done, len(items), tokens / (time.perf_counter() - start))
        return result

    def prepare(self, items: Sequence[Item], where: Sequence[str] = ()) -> list[Prepared]:
        """Token ids of every item, and what was done to its texts.

        Raises:
            BadInputError: the model's chat template refuses a conversation; with the entry of
                `where`.
        """
        out = []
        for i, item in enumerate(items):
            try:
                out.append(
                    self.format.pair(
                        item.prompt, item.response, self.max_prompt_tokens, self.max_response_tokens
                    )
                )
            except BadInputError as error:
                place = f"{where[i]}: " if where else ""
                raise BadInputError(f"{place}{error}") from error
        return out

    def _rows(self, prepared: Sequence[Prepared]) -> list[_Row]:
        """One row per prompt (packed) or one per response, longest last."""
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for i, one in enumerate(prepared):
            by_prompt.setdefault(tuple(one.prompt), []).append(i)
        rows = []
        for ids, index in by_prompt.items():
            # more responses in a row would spend more on masked-out attention than they save
            step = 4 if self.packed else 1
            for at in range(0, len(index), step):
                part = index[at : at + step]
                rows.append(_Row(list(ids), [prepared[i].reply for i in part], part))
        return sorted(rows, key=lambda row: row.length)

    def _forward(self, rows: Sequence[_Row], layers: list[int]) -> dict[int, Tensor]:
        """Hidden states [rows, length, H] after each of `layers`; blocks above the highest are not
        run."""
        width = max(row.length for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        position = torch.zeros(len(rows), width, dtype=torch.long)
        segment = torch.full((len(rows), width), -1)
        for r, row in enumerate(rows):
            begin = len(row.prompt)
            ids[r, :begin] = torch.tensor(row.prompt)
            position[r, :begin] = torch.arange(begin)
            segment[r, :begin] = 0
            for s, response in enumerate(row.responses, start=1):
                end = begin + len(response)
                ids[r, begin:end] = torch.tensor(response)
                position[r, begin:end] = torch.arange(
                    len(row.prompt), len(row.prompt) + len(response)
                )
                segment[r, begin:end] = s
                begin = end
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if any(len(row.responses) > 1 for row in rows):
            inputs["attention_mask"] = _segment_mask(segment, self.dtype).to(self.device)
            inputs["position_ids"] = position.to(self.device)
        else:
            inputs["attention_mask"] = (segment >= 0).long().to(self.device)
        if self.causal:
            inputs["use_cache"] = False
        return self._run(inputs, layers)

    def _run(self, inputs: dict[str, Any], layers: list[int]) -> dict[int, Tensor]:
        captured: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[[Any, Any, Any], None]:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                captured[layer] = (output[0] if isinstance(output, tuple) else output).float().cpu()
                if layer == layers[-1]:
                    raise _AllCapturedError

            return hook

        handles = [self._blocks[layer - 1].register_forward_hook(keep(layer)) for layer in layers]
        try:
            self._module(**inputs)
        except _AllCapturedError:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return captured

    def _find_blocks(self) -> torch.nn.ModuleList:
        for module in self._module.modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == self.num_layers:
                return module
        raise BadInputError(
            f"backbone '{self.name}' has no stack of {self.num_layers} blocks to read features from"
        )

    @torch.inference_mode()
    def _packing_is_exact(self) -> bool:
        prompt = (Message("user", "Is rain wet?"),)
        items = [Item(prompt, "Yes, it is."), Item(prompt, "No.")]
        layer = min(2, self.num_layers)
        ready = self.prepare(items)
        row = _Row(ready[0].prompt, [one.reply for one in ready], [0, 1])
        begin = len(row.prompt)
        try:
            packed = self._forward([row], [layer])[layer][0, begin:]
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            logger.info(
                "%s takes no segment mask (%s): prompts are read once per response",
                self.name,
                error,
            )
            return False
        plain = [
            self._forward([_Row(row.prompt, [response], [0])], [layer])[layer][0, begin:]
            for response in row.responses
        ]
        exact = torch.allclose(
            packed, torch.cat(plain), rtol=0.05, atol=0.05 * float(packed.abs().mean()) + 1e-6
        )
        if not exact:
            logger.info(
                "%s ignores the segment mask: prompts are read once per response", self.name
            )
        return exact


class _AllCapturedError(Exception):
    """Ends a forward pass once the highest layer that is needed is known."""


def _segment_mask(segment: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [b, 1, q, k]: causal; a token sees the prompt (segment 0) and its own segment;
    padding sees itself."""
    same = segment.unsqueeze(-1) == segment.unsqueeze(-2)
    prompt = (segment == 0).unsqueeze(-2)
    allowed = torch.ones(segment.shape[-1], segment.shape[-1], dtype=torch.bool).tril() & (
        same | prompt
    )
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
    return mask.unsqueeze(1)


def _pool(hidden: Float[Tensor, "l h"], pooling: Pooling) -> Float[Tensor, "h"]:
    """`last`: the end-of-turn position; `mean`: over all of the response's tokens."""
    return hidden[-1] if pooling == "last" else hidden.mean(0)


def _batches(rows: Sequence[_Row], token_budget: int) -> Iterator[list[_Row]]:
    """Consecutive rows, sorted by length, whose padded size fits the budget (a longer row goes
    alone)."""
    batch: list[_Row] = []
    for row in rows:
        if batch and (len(batch) + 1) * row.length > token_budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
