"""Softmax attention as a layer: full or windowed, grouped heads, rotary positions, query/key norm, output gate."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import Attention
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.layers.context import Context
from plait.layers.declared import MixerModule
from plait.layers.norm import Norm, untouched
from plait.layers.rope import angles, sharpen, turn
from plait.ops.attention import Heads, Start, attention
from plait.ops.attention.paged import paged_attention, placed, write_pages
from plait.ops.frame import newest
from plait.ops.kernels import Call, cast
from plait.state import KV, Appended, Pages, State, Window

S = TypeVar("S", bound=Appended)


class AttentionLayer(MixerModule):
    """`qkv_proj` holds the rows of q, k, v and, with `output_gate`, of the gate, in this order."""

    projection = "o_proj"
    config: Attention
    qkv_proj: nn.Linear
    q_norm: Norm | None
    k_norm: Norm | None
    value_mix: nn.Parameter | None
    sinks: nn.Parameter | None

    @classmethod
    def ops(cls, config: Attention, call: Call) -> list[tuple[str, Heads | None]]:
        if call.pooled and (call.tokens == "one" or not config.window):
            return [("write_pages", None), ("paged_attention", None)]
        capped, size = config.softcap is not None, config.head_dim
        heads = Heads(size, size, capped, config.sinks, config.prefix > 0)
        return [("packed_attention" if call.packed else "attention", heads)]

    def __init__(self, config: Attention, design: ModelConfig):
        super().__init__(config, design)
        q, k, v, *gate = config.rows().values()
        self.widths = [q + k, v, *gate]
        if not config.qk_norm:
            self.q_norm = self.k_norm = None
        if not (config.wrap and config.wrap.value_residual):
            self.value_mix = None
        if not config.sinks:
            self.sinks = None

    @property
    def logits(self) -> dict[str, Any]:
        """What becomes of q . k before it is a weight."""
        return {"scale": self.config.scale, "softcap": self.config.softcap, "sinks": self.sinks}

    @property
    def sees(self) -> dict[str, Any]:
        """Which keys a query sees."""
        return {"window": self.config.window, "prefix": self.config.prefix}

    def inner(
        self, x: Float[Tensor, "b t d"], context: Context, state: KV | Window | Pages | None
    ) -> tuple[Float[Tensor, "b t d"], KV | Window | Pages | None]:
        c, (b, t, _) = self.config, x.shape
        qk, v, *gate = self.qkv_proj(x).split_with_sizes(self.widths, -1)
        qk, v = qk.view(b, t, c.heads + c.kv_heads, -1), v.view(b, t, c.kv_heads, -1)
        if context.rows is not None and isinstance(state, Pages) and self.at_once(qk, v, state):
            o = self.placed(qk, v, context, state)
        else:
            o, state = self.attended(qk, v, context, state)
        o = o.flatten(2)
        return o * torch.sigmoid(gate[0]) if gate else o, state

    def attended(
        self, qk: Float[Tensor, "b t h k"], v: Float[Tensor, "b t g k"], context: Context, state: Any
    ) -> tuple[Float[Tensor, "b t h k"], Any]:
        """From what is projected to the heads' outputs, one thing after the other."""
        c, qk = self.config, self.normed(qk)
        if self.value_mix is not None:
            v = self.with_first(v, self.value_mix, context)
        if c.rope is not None:
            qk = turn(qk, c.rope, context)
        q, k = qk.split_with_sizes((c.heads, c.kv_heads), 2)
        if c.temperature is not None:
            q = sharpen(q, c.temperature, context)
        if state is None:
            o = attention(q, k, v, packing=context.packing, **self.sees, **self.logits)
        elif context.rows is not None:
            o = self.pooled(q, k, v, context, state)
        elif isinstance(state, Window):
            o, state = self.windowed(q, k, v, context, state)
        elif isinstance(state, KV):
            o, state = over_all(q, [k, v], context, state, self.attend)
        else:
            raise TypeError(f"attention has no use for a state of kind {state.kind!r}")
        return o, state

    def normed(self, qk: Float[Tensor, "b t h k"]) -> Float[Tensor, "b t h k"]:
        """Queries and keys, where they are normed: each head, or all of them together."""
        if self.q_norm is None or self.k_norm is None:
            return qk
        q, k = qk.split_with_sizes((self.config.heads, self.config.kv_heads), 2)
        if self.config.qk_norm != "wide":
            return torch.cat([self.q_norm(q), self.k_norm(k)], 2)
        return torch.cat([self.q_norm(q.flatten(2)), self.k_norm(k.flatten(2))], -1).view(qk.shape)

    def with_first(self, v: Tensor, mix: Tensor, context: Context) -> Tensor:
        """l1 v + l2 v0, v0 the values of the model's first attention layer (arXiv 2410.17897); in that layer v0 is v."""
        first = context.cached("v0", lambda: v)
        here, there = cast(mix, v.dtype).unbind()
        return here * v + there * first

    def attend(self, q: Tensor, kept: Sequence[Tensor], q_start: Start, k_start: Start | None) -> Tensor:
        return attention(q, *kept, q_start=q_start, k_start=k_start, **self.logits)

    def windowed(self, q: Tensor, k: Tensor, v: Tensor, context: Context, state: Window) -> tuple[Tensor, Window]:
        """Attend to what the state keeps, the first tokens and the tail, and to the new tokens."""
        packing, prefix = context.packing, self.config.prefix
        tail = state.k.shape[1] - prefix
        if packing is not None:
            q, k, v = (packing.to_rows(x) for x in (q, k, v))
        start = context.starts if context.ragged or context.lengths is None else context.lengths[0]
        seen = []
        for old, new in ((state.k, k), (state.v, v)):
            first = [with_first_tokens(old[:, :prefix], new, context)] if prefix else []
            seen.append(torch.cat([*first, old[:, prefix:].to(new.dtype), new], 1))
        o = attention(q, *seen, q_start=start, k_start=start - tail, **self.sees, **self.logits)
        kept = []
        for x in seen:
            last = newest(x, tail) if packing is None else packing.last(x[:, prefix:], tail)
            kept.append((torch.cat([x[:, :prefix], last], 1) if prefix else last).to(state.k.dtype))
        return o if packing is None else packing.from_rows(o), Window(*kept)

    def pooled(self, q: Tensor, k: Tensor, v: Tensor, context: Context, state: State) -> Tensor:
        """Write the new tokens into a pool and attend to what it holds of their rows."""
        keys, values = state.tensors().values()
        rows, table, ends = context.rows, context.table, context.ends
        if not isinstance(state, Window):
            if table is None:  # a row's one page is its own
                keys, values = keys[rows], values[rows]
            write_pages(keys, values, k, v, table, ends)
            return paged_attention(q, keys, values, table, ends, **self.logits)
        if isinstance(rows, slice):
            keys, values, rows = keys[rows], values[rows], None
        size = self.config.prefix + (self.config.window or 0)
        if q.shape[1] > 1 or keys.shape[1] > size:  # with room for drafts some places hold what a query no longer sees
            return self.round_the_ring(q, k, v, context, (keys, values), rows)
        # first tokens and ring are a page: in which order keys lie in it, attention does not ask
        table = None if rows is None else rows[:, None]
        write_pages(keys, values, k, v, table, place_in_ring(context.starts, self.config.prefix, size) + 1)
        return paged_attention(q, keys, values, table, ends.clamp_max(size), **self.logits)

    def at_once(self, qk: Tensor, v: Tensor, state: Pages) -> bool:
        """Whether one kernel norms, turns and writes the new tokens of a pool."""
        c, (keys, values) = self.config, state.tensors().values()
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        simple = c.rope is not None and c.qk_norm != "wide" and c.temperature is None and self.value_mix is None
        turned = simple and c.rope is not None and c.rope.rotated(qk.shape[-1])
        return bool(turned) and untouched(*norms) and placed.fits(qk, v, keys, values)

    def placed(self, qk: Tensor, v: Tensor, context: Context, state: Pages) -> Tensor:
        """`pooled` of what is projected."""
        (keys, values), table, rope, norms = state.tensors().values(), context.table, self.config.rope, {}
        if table is None:  # a row's one page is its own
            keys, values = keys[context.rows], values[context.rows]
        if self.q_norm is not None and self.k_norm is not None:
            config = self.q_norm.config
            assert isinstance(config, RMSNorm)  # as all norms within layers
            norms = {
                "norms": (self.q_norm.weight, self.k_norm.weight),
                "eps": config.eps,
                "zero_centered": config.zero_centered,
            }
        assert rope is not None  # or `at_once` would have said no
        turns = angles(rope, rope.rotated(qk.shape[-1]), context, qk.dtype)
        q = placed.place(qk, v, *turns, keys, values, table, context.ends, **norms)
        return paged_attention(q, keys, values, table, context.ends, **self.logits)

    def round_the_ring(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, room: tuple[Tensor, Tensor], rows: Tensor | None
    ) -> Tensor:
        """Several tokens at once: later ones would write over what earlier ones must see, so old keys are taken out first."""
        starts, prefix, window, places = context.starts, self.config.prefix, self.config.window or 0, room[0].shape[1]
        row = (torch.arange(len(q), device=q.device) if rows is None else rows)[:, None]
        old = place_in_ring(starts[:, None] + torch.arange(1 - window, 0, device=q.device), prefix, places)
        seen = []
        for x, new in zip(room, (k, v), strict=True):
            first = [with_first_tokens(x[row[:, 0], :prefix], new, context)] if prefix else []
            seen.append(torch.cat([*first, x[row, old].to(q.dtype), new], 1))
        at, size = place_in_ring(context.positions, prefix, places), places - prefix
        for x, new in zip(room, (k, v), strict=True):
            if (
                prefix and new.shape[1] > size
            ):  # the first tokens of all may be among them; what else this is, is written over
                x[row, at[:, :prefix]] = new[:, :prefix].to(x.dtype)
            x[row, at[:, -size:]] = new[:, -size:].to(x.dtype)
        return attention(q, *seen, q_start=starts, k_start=starts - (window - 1), **self.sees, **self.logits)


def over_all(
    q: Tensor, new: Sequence[Tensor], context: Context, state: S, attend: Callable[..., Tensor]
) -> tuple[Tensor, S]:
    """`attend(q, all that is kept since the start, q_start, k_start)` of the new tokens, which are kept first. In the buffer,
    token j stands at position j."""
    packing = context.packing
    if torch.compiler.is_compiling() and packing is None:
        state, kept = state.lined_up(new, context.starts)
        before = context.starts - (kept[0].shape[1] - new[0].shape[1])
        return attend(q, [x.to(q.dtype) for x in kept], context.starts, before), state
    if not context.ragged and context.lengths is not None:
        state, kept = state.extend(new, None, None)
        return attend(q, [cast(x, q.dtype) for x in kept], context.lengths[0], None), state
    state, kept = state.extend(new, context.row_of, context.positions)
    rows = q if packing is None else packing.to_rows(q)
    o = attend(rows, [x.to(q.dtype) for x in kept], context.starts, None)
    return (o if packing is None else packing.from_rows(o)), state


def place_in_ring(at: Tensor, prefix: int, places: int) -> Tensor:
    """Where a pool keeps the token at a position: the first ones in order, all others in a ring behind them."""
    if not prefix:
        return at % places
    return torch.where(at < prefix, at, prefix + (at - prefix) % (places - prefix))


def with_first_tokens(old: Tensor, new: Tensor, context: Context) -> Tensor:
    """The first tokens of each row, old (b, p, h, k), and those of them that are among the new ones (b, t, h, k)."""
    index = torch.arange(old.shape[1], device=old.device) - context.starts[:, None]  # (b, p)
    counts = new.shape[1] if context.packing is None else context.packing.counts[:, None]
    row = torch.arange(len(new), device=old.device)[:, None]
    taken = new[row, index.clamp(0, new.shape[1] - 1)]
    return torch.where(((index >= 0) & (index < counts))[..., None, None], taken, old.to(new.dtype))
