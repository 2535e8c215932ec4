"""The language model: embedding, residual stack, head. One call form for training, prefill, decoding and packing."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plait.design import count
from plait.design.layers import Attention
from plait.design.model import ModelConfig
from plait.design.spec import StateSpec
from plait.design.summary import summary
from plait.layers import Context, build_stack, context_for
from plait.layers.norm import Norm
from plait.model.padding import Padding, packed_lengths
from plait.ops.numbers import whole_number
from plait.ops.shooting import NotConverged
from plait.state import KV, Branches, ModelState, Nothing, Recurrent, SlotState, Window


class LanguageModel(nn.Module):
    """Built by `plait.build(design)`; `print(model)` shows its slots, parameters, FLOPs and state bytes."""

    def __init__(self, design: ModelConfig):
        super().__init__()
        self.design = design
        self.embed = nn.Embedding(design.vocab, design.dim)
        self.slots = build_stack(design)
        self.norm = Norm(design.dim, design.norm)
        self.lm_head = None if design.tie_embeddings else nn.Linear(design.dim, design.vocab, bias=False)
        self.activation_checkpointing = False
        ropes = [c.rope for c in design.bound.values() if isinstance(c, Attention) and c.rope]
        self.max_positions = min((r.max_positions for r in ropes if r.max_positions), default=None)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        state: ModelState | None = None,
        *,
        cu_seqlens: Int[Tensor, " n+1"] | None = None,
        attention_mask: Tensor | None = None,
        stats: dict[str, Any] | None = None,
    ) -> tuple[Float[Tensor, "b t v"], ModelState | None]:
        """Logits (b, t, vocab), and the state after these tokens where one was given.

        cu_seqlens: batch 1, documents packed end to end, n + 1 offsets from 0; a state then has one row per document.
        attention_mask (b, t): 1 for tokens, 0 for padding on either side; logits at padding mean nothing.
        stats: a dict that layers leave numbers about this call in.
        """
        hidden, state = self.features(tokens, state, cu_seqlens=cu_seqlens, attention_mask=attention_mask, stats=stats)
        return self.head(hidden), state

    def features(
        self,
        tokens: Int[Tensor, "b t"],
        state: ModelState | None = None,
        *,
        cu_seqlens: Int[Tensor, " n+1"] | None = None,
        attention_mask: Tensor | None = None,
        stats: dict[str, Any] | None = None,
    ) -> tuple[Float[Tensor, "b t d"], ModelState | None]:
        """What `head` reads: the normed output of the last slot, zero at padding. Arguments as in `forward`."""
        tokens = self._check_tokens(tokens)
        padding = None
        documents = None
        if attention_mask is not None:
            if cu_seqlens is not None:
                raise ValueError("give cu_seqlens or attention_mask, not both: packed rows have no padding")
            padding = Padding.of(tokens, attention_mask)
        if padding is not None:
            tokens, documents = padding.remove(tokens), padding.lengths
        elif cu_seqlens is not None:
            documents = packed_lengths(tokens, cu_seqlens)
        rows = tokens.shape[0] if documents is None else len(documents)
        self._check_state(state, rows)
        context = context_for(tokens, state.lengths if state else None, documents)
        self._check_length(context, documents)
        hidden, slots = self._stack(self.embed(tokens), context, state.slots if state else None, stats)
        hidden = self.norm(hidden)
        if padding is not None:
            hidden = padding.restore(hidden)
        if state is None:
            return hidden, None
        counts = documents or (tokens.shape[1],) * rows
        lengths = tuple(n + c for n, c in zip(state.lengths, counts, strict=True))
        return hidden, ModelState(slots, lengths, state.design)

    def head(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """Logits from `features`."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Float[Tensor, "v d"]:
        """The head's matrix: the embeddings themselves where they are tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def _stack(
        self,
        x: Float[Tensor, "b t d"],
        context: Context,
        states: tuple[SlotState, ...] | None,
        stats: dict[str, Any] | None,
    ) -> tuple[Float[Tensor, "b t d"], tuple[SlotState, ...]]:
        after = []
        for i, slot in enumerate(self.slots):
            before, address = states[i] if states else None, self.design.slots[i].address
            try:
                if self.activation_checkpointing and torch.is_grad_enabled():
                    x, new, here = checkpoint(_run, slot, x, context.slot(), before, use_reentrant=False)
                else:
                    x, new, here = _run(slot, x, context.slot(), before)
            except NotConverged as error:
                raise NotConverged(f"{address}{error}") from None
            context.learn(here)
            after.append(new)
            if stats is not None:
                for path, numbers in here.found.items():
                    stats.setdefault(address + path, {}).update(numbers)
        return x, tuple(after)

    def init_state(self, batch: int = 1, length: int = 0) -> ModelState:
        """The state before the first token, with room for the keys of `length` tokens (it grows by itself)."""
        batch, length = whole_number("init_state: batch", batch, 1), whole_number("init_state: length", length, 0)
        spec = self.state_spec(batch, length)
        lengths = (0,) * batch
        with torch.inference_mode(False):  # or only calls in inference mode could append to the keys
            slots = tuple(_start(part, lengths, self.device) for part in spec.branches)
        return ModelState(slots, lengths, self.design.hash)

    def state_spec(self, batch: int = 1, length: int = 0) -> StateSpec:
        """Shapes, dtypes and bytes of the state of `batch` sequences of `length` tokens; allocates nothing."""
        return count.state_spec(self.design, batch, length, str(self.dtype).removeprefix("torch."))

    def _check_tokens(self, tokens: Tensor) -> Tensor:
        """The tokens in a dtype that embeddings take."""
        if not isinstance(tokens, Tensor):
            raise ValueError(
                f"tokens must be a tensor of integers of shape (batch, time), as in torch.tensor([[1, 2]]); "
                f"got {type(tokens).__name__}"
            )
        integers = tokens.dtype != torch.bool and not tokens.is_floating_point() and not tokens.is_complex()
        if tokens.ndim != 2 or not integers:
            raise ValueError(
                f"tokens must be integers of shape (batch, time), got {tuple(tokens.shape)} {tokens.dtype}"
            )
        if (
            tokens.device != self.device and self.device.type != "meta"
        ):  # there weights are while a hook will bring them
            raise ValueError(
                f"tokens are on {tokens.device}, the model is on {self.device}: give tokens.to(model.device)"
            )
        if tokens.dtype not in (torch.int32, torch.int64):
            tokens = tokens.long()
        if tokens.numel() == 0:
            raise ValueError(
                f"tokens are empty, shape {tuple(tokens.shape)}: a call needs at least one row of one token"
            )
        # a device would have to be asked for the largest id, which costs more than the call is worth
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(x) for x in torch.aminmax(tokens))
            if low < 0 or high >= self.design.vocab:
                wrong = low if low < 0 else high
                raise ValueError(f"token id {wrong} is outside the model's vocabulary of {self.design.vocab}")
        return tokens

    def _check_state(self, state: ModelState | None, rows: int) -> None:
        if state is None:
            return
        if not isinstance(state, ModelState):
            raise ValueError(f"state must come from model.init_state() or an earlier call, got {type(state).__name__}")
        if state.design != self.design.hash:
            raise ValueError(
                f"this state belongs to another design ({state.design}) than this model's ({self.design.hash}, "
                f"{self.design.pattern!r}); start with model.init_state()"
            )
        if state.batch != rows:
            raise ValueError(f"the state has {state.batch} rows, but the call has {rows}; use state.select(rows)")
        if not torch.compiler.is_compiling() and state.device not in (None, self.device) and self.device.type != "meta":
            raise ValueError(f"the state is on {state.device}, the model on {self.device}: give state.to(model.device)")

    def _check_length(self, context: Context, documents: tuple[int, ...] | None) -> None:
        if self.max_positions is None:
            return
        counts = documents or (context.positions.shape[1],) * len(context.lengths)
        longest = max(n + c for n, c in zip(context.lengths, counts, strict=True))
        if longest > self.max_positions:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than RoPE was configured for (max_positions {self.max_positions})"
            )

    def __repr__(self) -> str:
        return summary(self.design)


def _run(
    slot: nn.Module, x: Tensor, context: Callable[[], Context], before: SlotState | None
) -> tuple[Tensor, SlotState, Context]:
    here = context()
    x, after = slot(x, here, before)
    return x, after, here


_VALUES = {"window": Window, "recurrent": Recurrent, "none": Nothing}


def _start(spec: StateSpec, lengths: tuple[int, ...], device: torch.device) -> SlotState:
    if spec.branches:
        return Branches(tuple(_start(part, lengths, device) for part in spec.branches))
    tensors = [torch.zeros(t.shape, dtype=getattr(torch, t.dtype), device=device) for t in spec.tensors]
    for tensor, t in zip(tensors, spec.tensors, strict=True):
        for i, value in enumerate(t.start):
            tensor[:, i] = value
    return KV.of(tensors[0], tensors[1], lengths) if spec.kind == "kv" else _VALUES[spec.kind](*tensors)
