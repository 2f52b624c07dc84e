"""The engine of this process: continuous batching with a z per row.

All answers under way take their next token in one call of the model, whatever their z; a request
joins the batch as soon as there is room, and leaves it when it ends (as in Orca: Yu et al., 2022,
OSDI). A row under the base model itself has its adapter switched off.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.errors import BadInputError, RunError
from fedvpa.policy.conditioning import padding_first
from fedvpa.policy.engine import BusyError, Finish, Piece, Request, Tell, TooLongError
from fedvpa.policy.policy import Policy
from fedvpa.policy.rows import Rows, draw_rows, left_padded
from fedvpa.policy.transcript import Transcript

logger = logging.getLogger("fedvpa")

PREFILL = 4096
"""Tokens of conversations that are read in one call; a longer one is read alone."""


@dataclass(eq=False)
class _Row:
    """A request under way: `effect` is what its z does."""

    request: Request
    tell: Tell
    ids: list[int]
    most: int
    effect: Tensor | None
    transcript: Transcript
    generator: torch.Generator
    drawn: int = 0
    token: int = 0
    cancelled: bool = False
    ended: bool = False

    @property
    def prompt_tokens(self) -> int:
        return len(self.ids)

    def cancel(self) -> None:
        self.cancelled = True


class BatchingEngine:
    """Answers of a policy, or of a bare base model, in a thread of its own.

    Args:
        policy: the model.
        rows: most answers side by side.
        waiting: most requests that wait; one more is refused.
    """

    name = "transformers"

    def __init__(self, policy: Policy, rows: int = 32, waiting: int = 256) -> None:
        self._policy, self._most, self._room = policy, rows, waiting
        self._conditioner: Any = getattr(policy.model, "conditioner", None)
        self._waiting: deque[_Row] = deque()
        self._live: list[_Row] = []
        self._rows: Rows | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._tokens = 0
        self._on: Tensor | None = None
        self._hooks = [
            ranks.register_forward_hook(self._switch)
            for module in policy.model.modules()
            for ranks in getattr(module, "lora_A", {}).values()
        ]
        self._thread = threading.Thread(target=self._run, name="fedvpa-engine", daemon=True)
        self._thread.start()

    @property
    def context(self) -> int:
        """Most tokens of a conversation and its answer."""
        config = self._policy.model.config
        return int(getattr(config, "max_position_embeddings", 0) or 1 << 20)

    @property
    def load(self) -> dict[str, int]:
        """How many requests run and wait, and the tokens drawn so far."""
        with self._changed:
            return {
                "running": sum(not row.ended for row in self._live),
                "waiting": len(self._waiting),
                "tokens": self._tokens,
            }

    def submit(self, request: Request, tell: Tell) -> _Row:
        """Queue a request.

        Raises:
            BusyError: as many wait as may.
            TooLongError: the conversation leaves no room for the answer.
            BadInputError: the chat template refuses it, or z is of another dimension.
        """
        row = self._row(request, tell)
        with self._changed:
            if self._closing:
                raise RunError("the engine is closed")
            if len(self._waiting) >= self._room:
                raise BusyError(f"{self._room} requests wait already")
            self._waiting.append(row)
            self._changed.notify()
        return row

    def close(self) -> None:
        """End what runs, as cancelled; the thread has ended when this returns."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        for hook in self._hooks:
            hook.remove()

    def _row(self, request: Request, tell: Tell) -> _Row:
        policy, drawing = self._policy, request.drawing
        ids = policy.prompt_ids(request.prompt)
        soft = self._conditioner is not None and self._conditioner.form == "prefix"
        taken = len(ids) + (self._conditioner.start.shape[0] if soft else 0)
        room = self.context - taken
        if room < 1:
            raise TooLongError(
                f"the conversation has {taken} tokens; the model's context has {self.context}"
            )
        effect = None
        if request.z is not None:
            if self._conditioner is None:
                raise BadInputError("the base model knows no z; give a policy")
            if request.z.shape != self._conditioner.centre.shape:
                raise BadInputError(
                    f"z has {request.z.numel()} dimensions, but the policy was trained with"
                    f" {len(self._conditioner.centre)}"
                )
            with torch.no_grad():
                effect = self._conditioner(request.z.to(policy.device).unsqueeze(0))
        return _Row(
            request, tell, ids, min(drawing.tokens or room, room), effect,
            Transcript(policy.tokenizer, drawing.stop, policy.format.opens_thought),
            torch.Generator().manual_seed(drawing.seed % (1 << 63)),
        )  # fmt: skip

    # -- the thread

    def _run(self) -> None:
        self._policy.model.eval()
        while True:
            with self._changed:
                while not (self._closing or self._waiting or self._live):
                    self._changed.wait()
                if self._closing:
                    everybody = [*self._live, *self._waiting]
                    self._live, self._rows = [], None
                    self._waiting.clear()
                    break
                coming = self._admitted()
            try:
                with torch.inference_mode():
                    if coming:
                        self._join(coming)
                    self._step()
            except Exception as error:  # one request must not end the others' server
                # where, but not what: a message may hold somebody's text
                where = "".join(traceback.format_tb(error.__traceback__))
                name = type(error).__name__
                logger.error("the engine failed (%s); answers are lost\n%s", name, where)
                failed = [*self._live, *(row for row in coming if row not in self._live)]
                self._live, self._rows = [], None
                for row in failed:
                    self._say(row, RunError(f"the engine failed: {type(error).__name__}"))
        for row in everybody:
            self._end(row, "cancelled")

    def _admitted(self) -> list[_Row]:
        """Of those who wait, as many as there is room for, and as may be read in one call."""
        coming: list[_Row] = []
        longest = 0
        while self._waiting and len(self._live) + len(coming) < self._most:
            row = self._waiting[0]
            longest = max(longest, len(row.ids))
            if coming and longest * (len(coming) + 1) > PREFILL:
                break
            self._waiting.popleft()
            if row.cancelled:
                self._end(row, "cancelled")
                continue
            coming.append(row)
        return coming

    def _join(self, coming: list[_Row]) -> None:
        """Read conversations, and take them into the batch with their first token."""
        from transformers import DynamicCache

        policy = self._policy
        filler = policy.tokenizer.pad_token_id
        tokens, mask = left_padded(
            [row.ids for row in coming], policy.stops[0] if filler is None else filler,
            policy.device,
        )  # fmt: skip
        given: dict[str, Any] = {"input_ids": tokens}
        if self._conditioner is not None and self._conditioner.form == "prefix":
            embedded = policy.model.get_input_embeddings()(tokens)
            soft = self._effects(coming).to(embedded.dtype)
            steered = mask.new_tensor([[row.effect is not None] for row in coming])
            mask = torch.cat([steered.expand(-1, soft.shape[1]), mask], 1)
            embedded, mask = padding_first(torch.cat([soft, embedded], 1), mask)
            given = {"inputs_embeds": embedded}
        cache = DynamicCache()
        place = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = self._logits(coming, **given, attention_mask=mask, position_ids=place, cache=cache)
        rows = Rows(cache, mask)
        self._rows = rows if self._rows is None else self._rows.joined(rows)
        with self._changed:
            self._live += coming
        self._take(coming, logits)

    def _step(self) -> None:
        """One more token of every row."""
        self._leave()
        if not self._live or self._rows is None:
            return
        token = torch.tensor([[row.token] for row in self._live], device=self._policy.device)
        place = self._rows.place
        logits = self._logits(
            self._live, input_ids=token, attention_mask=self._rows.grown(), position_ids=place,
            cache=self._rows.cache,
        )  # fmt: skip
        self._take(self._live, logits)
        self._leave()

    def _logits(self, rows: Sequence[_Row], cache: Any, **given: Any) -> Float[Tensor, "b v"]:
        with self._steered(rows):
            out = self._policy.model(**given, cache=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float()

    def _take(self, rows: Sequence[_Row], logits: Float[Tensor, "b v"]) -> None:
        """Draw a token of each row, and tell what can be told of it."""
        drawing = [row.request.drawing for row in rows]
        device = logits.device
        chosen = draw_rows(
            logits, torch.tensor([d.temperature for d in drawing], device=device),
            torch.tensor([d.top_p for d in drawing], device=device),
            [row.generator for row in rows],
        ).tolist()  # fmt: skip
        self._tokens += len(rows)
        for row, token in zip(rows, chosen):
            row.token, row.drawn = token, row.drawn + 1
            if token in self._policy.stops:
                self._end(row, "stop")
                continue
            text = row.transcript.add(token)
            if row.transcript.stopped:
                self._end(row, "stop", text)
            elif row.drawn >= row.most:
                self._end(row, "length", text)
            elif text:
                self._say(row, Piece(text, row.drawn))

    def _leave(self) -> None:
        """Rows that have ended, or whose readers have gone, leave the batch."""
        for row in self._live:
            if row.cancelled and not row.ended:
                self._end(row, "cancelled")
        on = [i for i, row in enumerate(self._live) if not row.ended]
        if len(on) == len(self._live):
            return
        if not on:
            self._rows = None
        elif self._rows is not None:
            self._rows.kept(torch.tensor(on, device=self._policy.device))
        with self._changed:
            self._live = [self._live[i] for i in on]

    def _end(self, row: _Row, why: Finish, text: str = "") -> None:
        row.ended = True
        rest = "" if why == "cancelled" else row.transcript.end()
        self._say(row, Piece(text + rest, row.drawn, why))

    def _say(self, row: _Row, piece: Piece | Exception) -> None:
        row.ended = row.ended or isinstance(piece, Exception)
        try:
            row.tell(piece)
        except Exception as error:  # a reader's fault is not the others'
            logger.error("an answer could not be told (%s)", type(error).__name__)
            row.cancelled = True

    # -- z

    def _effects(self, rows: Sequence[_Row]) -> Tensor:
        """What z does, row by row; where there is none, nothing."""
        blank = torch.zeros_like(self._conditioner.start).unsqueeze(0)
        return torch.cat([blank if row.effect is None else row.effect for row in rows])

    @contextmanager
    def _steered(self, rows: Sequence[_Row]) -> Iterator[None]:
        """Every call of the model in it is under the rows' own z."""
        if self._conditioner is None:
            yield
            return
        on = [row.effect is not None for row in rows]
        device = self._policy.device
        self._on = torch.tensor(on, device=device).view(-1, 1, 1)
        try:
            with self._conditioner.holding_effect(self._effects(rows)):
                yield
        finally:
            self._on = None

    def _switch(self, _: Any, __: Any, out: Tensor) -> Tensor:
        """Forward hook of a LoRA layer's A: nothing of it for rows of the base model."""
        return out if self._on is None else out * self._on.to(out.dtype)
