"""The language model: embedding, residual stack, head. One call form for training, prefill, decoding and packing."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from plait.design import count
from plait.design.declared import front_weights
from plait.design.ends import Tokens
from plait.design.lora import LoRA
from plait.design.model import ModelConfig, nearest_place
from plait.design.places import Node, ParallelPlace, layers, paths
from plait.design.spec import Leaf, Memories, StateSpec, TensorSpec
from plait.design.summary import summary
from plait.layers import Channels, Context, announce, build_stack, context_for, normed, pooled_context
from plait.layers.channels import Listener, Place, send
from plait.layers.declared import Projection
from plait.layers.norm import Norm
from plait.layers.start import empty
from plait.model.front import with_meta
from plait.model.head import Head
from plait.model.one_weight import one_weight
from plait.model.padding import Padding, check_longest, packed
from plait.model.recompute import Choice, recomputed
from plait.model.tracing import refuse_tracing
from plait.ops.numbers import whole_number
from plait.ops.packing import Packing
from plait.ops.shooting import NotConverged
from plait.ops.token import few_rows
from plait.state import ModelState, Pool, PoolRows, SlotState, remember

S = TypeVar("S", ModelState, PoolRows)


class LanguageModel(nn.Module):
    """Front, slots, head. Built by `plait.build(design)`; `print(model)` shows slots, parameters, FLOPs and state bytes.

    embed (and embed_norm, positions, meta where the design has them) are the front, slots the residual stack, norm and
    lm_head (None where the embeddings are the head's matrix too) the head.
    """

    embed: nn.Module
    embed_norm: Norm | None
    positions: nn.Embedding | None
    meta: nn.Parameter | None

    def __init__(self, design: ModelConfig):
        super().__init__()
        self.design = design
        self._make_front()
        self.slots = build_stack(design)
        self.norm = Norm(design.dim, design.norm)
        self._make_head()
        self.reads_embeddings = any(slot.wrap.reads == "stream_and_embeddings" for slot in design.slots)
        self.activation_checkpointing: Choice = False
        self.listeners: Mapping[int, Mapping[Place, Listener]] = {}  # by slot; see `plait.model.listening`
        self.tokenizer_files: dict[str, bytes] = {}  # by name, of the folder it came from; `plait.save` writes them
        self.origin: dict[str, Any] | None = (
            None  # of a model read from another library's folder; see `plait.hub.checkpoint`
        )
        self.lora: LoRA | None = (
            None  # what its projections have been given, and the weights below; see `plait.model.lora`
        )
        self.base: tuple[str, str] | None = None
        self.max_positions = self.limit(design)

    @staticmethod
    def limit(design: ModelConfig) -> int | None:
        """How many tokens a sequence may have; None: any number."""
        ropes = [rope for p in layers(design.slots) if (rope := getattr(p.layer, "rope", None)) is not None]
        limits = [rope.max_positions - design.front.meta for rope in ropes if rope.max_positions]
        return min([*limits, *([design.front.positions] if design.front.positions else [])], default=None)

    def _make_front(self) -> None:
        design = self.design
        declared = {weight.name: weight for weight in front_weights(design)}
        if isinstance(design.front, Tokens):
            self.embed = nn.Embedding(design.vocab, design.dim, _weight=empty(declared["embed.weight"]).data)
        else:
            self.embed = Projection(declared["embed.weight"], declared.get("embed.bias"))
        self.embed_norm = Norm(design.dim, design.norm) if design.front.norm else None
        self.positions = None
        if table := declared.get("positions.weight"):
            self.positions = nn.Embedding(table.shape[0], table.shape[1], _weight=empty(table).data)
        self.meta = empty(declared["meta"]) if "meta" in declared else None

    def _make_head(self) -> None:
        design = self.design
        declared = {weight.name: weight for weight in design.head.weights(design.dim, design.vocab, design.tied)}
        own = declared.get("lm_head.weight")
        self.lm_head = None if own is None else Projection(own, declared.get("lm_head.bias"))
        self.lm_head_bias = empty(declared["lm_head_bias"]) if "lm_head_bias" in declared else None

    @property
    def head(self) -> Head:
        """`head(hidden)` gives logits from `features`; `head.loss(hidden, rule)` a loss."""
        return Head(self.design.head, self.lm_head, self.embed, self.lm_head_bias)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device  # type: ignore[union-attr,return-value]  # a table or a projection

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype  # type: ignore[union-attr,return-value]

    def forward(
        self,
        tokens: Shaped[Tensor, "b t ..."],
        state: S | None = None,
        *,
        cu_seqlens: Int[Tensor, " n+1"] | None = None,
        attention_mask: Tensor | None = None,
        channels: Channels | None = None,
    ) -> tuple[Float[Tensor, "b t v"], S | None]:
        """Logits (b, t, vocab), and the state after these tokens where one was given. Rows of a pool are moved on in place.

        tokens: ids (b, t), or vectors (b, t, features) where the design's front takes those.
        cu_seqlens: batch 1, documents packed end to end, n + 1 offsets from 0, best on the CPU, whatever the tokens are on; a
        state then has one row per document.
        attention_mask (b, t): 1 for tokens, 0 for padding on either side; logits at padding mean nothing.
        channels: takes the losses and the numbers that layers send.
        """
        hidden, state = self.features(
            tokens, state, cu_seqlens=cu_seqlens, attention_mask=attention_mask, channels=channels
        )
        return self.head(hidden), state

    def features(
        self,
        tokens: Shaped[Tensor, "b t ..."],
        state: S | None = None,
        *,
        cu_seqlens: Int[Tensor, " n+1"] | None = None,
        attention_mask: Tensor | None = None,
        channels: Channels | None = None,
    ) -> tuple[Float[Tensor, "b t d"], S | None]:
        """What `head` reads: the normed output of the last slot, zero at padding. Arguments as in `forward`."""
        refuse_tracing(self, self.design, tokens)
        tokens = self._checked_inputs(tokens)
        if isinstance(state, PoolRows):
            return self._on_pool(tokens, state, cu_seqlens, attention_mask, channels), state
        padding = packing = None
        most = None if state else self.max_positions  # with a state it is `_after` that looks
        if attention_mask is not None:
            if cu_seqlens is not None:
                raise ValueError("give cu_seqlens or attention_mask, not both: packed rows have no padding")
            padding = Padding.of(tokens, attention_mask)
        if padding is not None:
            check_longest(max(padding.lengths), most)
            tokens = padding.remove(tokens)
            packing = Packing.of_lengths(padding.lengths, tokens.device)
        elif cu_seqlens is not None:
            packing = packed(tokens, cu_seqlens, most)
        else:
            check_longest(tokens.shape[1], most)
        if packing is not None and state is not None and torch.compiler.is_compiling():
            raise ValueError(
                "packed documents that go on from a state are no part of a compiled graph: call the model itself"
            )
        if self.meta is not None and state is not None and state.some_fresh and torch.compiler.is_compiling():
            raise ValueError(
                "rows that begin beside rows that go on need the model's meta tokens alone, which no compiled graph can give "
                "them: call the model itself"
            )
        self._check_state(state, tokens.shape[0] if packing is None else packing.count)
        seen = None if state is None or torch.compiler.is_compiling() else state.lengths
        begins = state is None or state.fresh or (seen is not None and 0 in seen)
        stretch = with_meta(self._embed(tokens), self.meta if begins else None, seen, packing)
        context = context_for(stretch.x, None if state is None else state.seen, seen, stretch.packing)
        after = None if state is None else self._after(context)
        hidden, slots = self.run(
            self._placed(stretch.x, context), context, state.slots if state else None, channels=channels
        )
        hidden = self.norm(stretch.only_text(hidden))
        if padding is not None:
            hidden = padding.restore(hidden)
        if state is None:
            return hidden, None
        if stretch.packing is None:
            return hidden, state.then(slots, stretch.x.shape[1], after)
        return hidden, state.then(slots, stretch.packing.counts, after)

    def stream(
        self, tokens: Shaped[Tensor, "b t ..."], *, cu_seqlens: Int[Tensor, " n+1"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], Context]:
        """What the first slot reads of sequences from their beginning, and the context of that call: `run` goes on from both,
        slot by slot where that is asked. Arguments as in `forward`."""
        tokens, packing = self._checked_inputs(tokens), None
        if cu_seqlens is None:
            check_longest(tokens.shape[1], self.max_positions)
        else:
            packing = packed(tokens, cu_seqlens, self.max_positions)
        stretch = with_meta(self._embed(tokens), self.meta, None, packing)
        context = context_for(stretch.x, packing=stretch.packing)
        return self._placed(stretch.x, context), context

    @torch.no_grad()
    def _on_pool(
        self,
        tokens: Tensor,
        at: PoolRows,
        cu_seqlens: Tensor | None,
        attention_mask: Tensor | None,
        channels: Channels | None,
    ) -> Float[Tensor, "b t d"]:
        """`features` on rows of a pool: what the host has to do around `step`."""
        if cu_seqlens is not None or attention_mask is not None:
            raise ValueError("a call on rows of a pool takes whole rows: no cu_seqlens, no attention_mask")
        pool, count = at.pool, tokens.shape[1]
        if pool.design != self.design.hash or pool.device != self.device:
            raise ValueError(f"this pool is another model's: make one with model.init_pool, on {self.device}")
        if self.meta is not None and 0 in at.lengths:
            raise ValueError(
                "a row that has not read the model's meta tokens cannot begin in a pool: give its first tokens to a call on a "
                "value, and the state to pool.join"
            )
        if at.batch != len(tokens):
            raise ValueError(f"the call has {len(tokens)} rows, but {at.batch} rows of the pool")
        check_longest(max(at.lengths) + count - self.design.front.meta, self.max_positions)
        pool.reserve(at.rows, count)
        hidden = self.step(tokens, at, channels)
        pool.advance(at.rows, count)
        return hidden

    def step(
        self, tokens: Int[Tensor, "b t"], at: PoolRows, channels: Channels | None = None
    ) -> Float[Tensor, "b t d"]:
        """Features of more tokens in rows of a pool, which are moved on: a function of device tensors alone. The pool must have
        room reserved; rows begin with what `init_state` and a call on a value have given them."""
        context = pooled_context(tokens, at)
        hidden, _ = self.run(self._placed(self._embed(tokens), context), context, at.pool.slots, channels=channels)
        if isinstance(at.index, slice):
            at.pool.starts[at.index] += tokens.shape[1]
        else:
            at.pool.starts.index_copy_(0, at.index, context.ends)
        return normed(self.norm, hidden, context)

    def _embed(self, inputs: Shaped[Tensor, "b t ..."]) -> Float[Tensor, "b t d"]:
        x = self.embed(inputs.to(self.dtype) if inputs.is_floating_point() else inputs)
        return x if self.design.front.scale == 1 else x * self.design.front.scale

    def _placed(self, x: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t d"]:
        """Embeddings with learned positions, which meta tokens have none of, and normed, where the front says so."""
        if self.positions is not None:
            place = context.positions - self.design.front.meta
            table = self.positions(place.clamp_min(0))
            x = x + (table if self.meta is None else table * (place >= 0)[..., None])
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if self.reads_embeddings:
            context.shared["x0"] = x
        return x

    def run(
        self,
        hidden: Float[Tensor, "b t d"],
        context: Context,
        state: tuple[SlotState, ...] | None = None,
        *,
        slots: Iterable[int | str] | slice | None = None,
        channels: Channels | None = None,
    ) -> tuple[Float[Tensor, "b t d"], tuple[SlotState, ...]]:
        """The stream after some slots (all: None), by index, slice or address, in the order given; and their states.

        `state` is one value per slot of the model; `plait.layers.context_for(hidden)` makes a fresh context.
        """
        after, modules, indices = [], list(self.slots), list(self._indices(slots))
        if self.reads_embeddings and "x0" not in context.shared:
            for i in indices:
                if self.design.slots[i].wrap.reads == "stream_and_embeddings":
                    raise ValueError(
                        f"{self.design.slots[i].address} reads the embeddings too, which this context does not hold; take the "
                        "one that model.stream(tokens) gives"
                    )
        decoding = context.rows is not None and few_rows(hidden)
        for i, following in zip(indices, [*indices, None][1:], strict=True):
            if decoding:
                norm = self.norm if following is None else getattr(modules[following], "norm", None)
                announce(modules[i], norm, context)
            hidden, new = self._run_slot(i, modules[i], hidden, context, state[i] if state else None, channels)
            after.append(new)
        return hidden, tuple(after)

    def _indices(self, slots: Iterable[int | str] | slice | None) -> Iterable[int]:
        everything = range(len(self.slots))
        if slots is None:
            return everything
        if isinstance(slots, slice):
            return everything[slots]
        by_address = {slot.address: i for i, slot in enumerate(self.design.slots)}
        found = []
        for slot in slots:
            if isinstance(slot, str) and slot not in by_address:
                raise ValueError(f"there is no slot {slot!r}; {nearest_place(slot, by_address)}")
            if not isinstance(slot, str) and slot not in range(-len(everything), len(everything)):
                raise ValueError(f"there is no slot {slot!r}; the model has {len(everything)}, from 0 on")
            found.append(by_address[slot] if isinstance(slot, str) else everything[slot])
        return found

    def _run_slot(
        self,
        i: int,
        slot: nn.Module,
        x: Float[Tensor, "b t d"],
        context: Context,
        before: SlotState | None,
        channels: Channels | None,
    ) -> tuple[Float[Tensor, "b t d"], SlotState]:
        listeners = self.listeners.get(i, None if channels is None else {})
        again = recomputed(self.activation_checkpointing, slot)
        try:
            if listeners is None and again is None:  # nothing is sent: what is shared may be left in place
                return slot(x, context, before)
            if again is not None:
                x, new, here = again(_run, slot, x, context.slot(listeners), before)
            else:
                x, new, here = _run(slot, x, context.slot(listeners), before)
        except NotConverged as error:
            path, _, what = str(error).partition(": ")
            raise NotConverged(f"{paths(self.design.slots[i])[path]}: {what}") from None
        context.keep(here)
        if here.out is not None:
            send(here.out, paths(self.design.slots[i]), channels)
        return x, new

    def place(self, address: str) -> nn.Module:
        """The module at an address of `design.places()`: a layer's, or that of a parallel slot."""
        self.design.place(address)  # raises for an address that does not exist
        found = (_find(node, slot.mixer, address) for node, slot in zip(self.design.slots, self.slots, strict=True))
        return next(module for module in found if module is not None)

    def init_state(self, batch: int = 1, length: int = 0) -> ModelState:
        """The state before the first token, with room for the keys of `length` tokens (it grows by itself)."""
        batch, length = whole_number("init_state: batch", batch, 1), whole_number("init_state: length", length, 0)
        lengths, room = (0,) * batch, length + self.design.front.meta if length else 0

        def make(leaf: Leaf) -> Tensor:
            return _start(leaf.sized(batch, room), self.device)

        with torch.inference_mode(False):  # or only calls in inference mode could append to the keys
            slots = tuple(remember(part, lengths, make) for part in self._memory().parts)
            return ModelState.of(slots, lengths, self.design.hash, self.device)

    def init_pool(
        self, rows: int, length: int, *, page: int | None = None, pages: int | None = None, drafts: int = 0
    ) -> Pool:
        """Room for `rows` sequences of up to `length` tokens, written in place: what serving runs on (`plait.state.Pool`).
        Keys lie in `pages` pages of `page` tokens; without these a row has one page, and there is one for each row. `drafts`:
        how many tokens sliding windows can give back without a snapshot (`pool.truncate`), each a place more in every row."""
        rows, length = whole_number("init_pool: rows", rows, 1), whole_number("init_pool: length", length, 1)
        page = None if page is None else whole_number("init_pool: page", page, 1)
        pages = None if pages is None else whole_number("init_pool: pages", pages, 1)
        meta = self.design.front.meta
        room = {"tokens": length + meta, "page": page, "pages": pages, "meta": meta}
        drafts = whole_number("init_pool: drafts", drafts, 0)
        return Pool(self._memory(), self.design.hash, self.device, rows=rows, drafts=drafts, **room)

    def _memory(self) -> Memories:
        return count.memory(self.design, str(self.dtype).removeprefix("torch."))

    def state_spec(self, batch: int = 1, length: int = 0) -> StateSpec:
        """Shapes, dtypes and bytes of the state of `batch` sequences of `length` tokens; allocates nothing."""
        batch, length = whole_number("state_spec: batch", batch, 1), whole_number("state_spec: length", length, 0)
        return count.state_spec(self.design, batch, length, str(self.dtype).removeprefix("torch."))

    def _checked_inputs(self, inputs: Tensor) -> Tensor:
        if isinstance(self.design.front, Tokens):
            return self._checked_tokens(inputs)
        features = self.design.front.features
        tensor = isinstance(inputs, Tensor)
        if not tensor or inputs.ndim != 3 or not inputs.is_floating_point() or inputs.shape[-1] != features:
            raise ValueError(
                f"this model reads vectors: expected floating point numbers of shape (batch, time, {features}), "
                f"got {f'{tuple(inputs.shape)} {inputs.dtype}' if tensor else type(inputs).__name__}"
            )
        if inputs.numel() == 0:
            raise ValueError(
                f"inputs are empty, shape {tuple(inputs.shape)}: a call needs at least one row of one vector"
            )
        return inputs

    def _checked_tokens(self, tokens: Tensor) -> Tensor:
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
            low, high = map(int, torch.aminmax(tokens))
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

    def _after(self, context: Context) -> tuple[int, ...] | None:
        """What each row will have seen, meta tokens included; None where only the device knows. Raises ValueError where that
        is more than positions go."""
        packing, lengths = context.packing, context.lengths
        if lengths is None:
            return None
        counts = (context.positions.shape[1],) * len(lengths) if packing is None else packing.lengths
        after = tuple(n + c for n, c in zip(lengths, counts, strict=True))
        check_longest(max(after) - self.design.front.meta, self.max_positions)
        return after

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As of nn.Module, behind `to`, `to_empty` and the like."""
        with one_weight(self):
            return super()._apply(fn, recurse)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of nn.Module."""
        with one_weight(self):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def __repr__(self) -> str:
        return summary(self.design)


def _find(node: Node, module: Any, address: str) -> nn.Module | None:
    """The module of `address` in one slot, if it is there."""
    if node.address == address:
        return module
    for branch, chain in zip(node.branches, module.branches, strict=True) if isinstance(node, ParallelPlace) else ():
        for part, layer in zip(branch, chain.layers, strict=True):
            if (found := _find(part, layer, address)) is not None:
                return found
    return None


def _run(
    slot: nn.Module, x: Tensor, context: Callable[[], Context], before: SlotState | None
) -> tuple[Tensor, SlotState, Context]:
    here = context()
    x, after = slot(x, here, before)
    return x, after, here


def _start(spec: TensorSpec, device: torch.device) -> Tensor:
    tensor = torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
    for i, value in enumerate(spec.start):
        tensor[:, i] = value
    return tensor
