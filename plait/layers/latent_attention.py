"""Multi-head latent attention as a layer."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import LatentAttention
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.layers.attention import over_all
from plait.layers.context import Context
from plait.layers.declared import MixerModule
from plait.layers.norm import Norm
from plait.layers.rope import turn
from plait.ops.attention import Heads, attention
from plait.ops.attention.paged import paged_attention, write_pages
from plait.ops.kernels import Call
from plait.ops.products import linear
from plait.state import Latent, Pages


class LatentAttentionLayer(MixerModule):
    """arXiv 2405.04434, section 2.1. Of every token it keeps the normed latent c and, behind it, the turned key r.

    k_up and v_up read keys and values off c. Many tokens have theirs spelled out (`expanded`); few tokens that meet many are
    taken to the latents instead (`absorbed`): q . (k_up c) = (q k_up) . c, and the values' sum is v_up times that of latents.
    """

    projection = "o_proj"
    config: LatentAttention
    in_proj: nn.Linear
    q_norm: Norm | None
    q_proj: nn.Linear | None
    kv_norm: Norm | None
    k_up: nn.Parameter  # (h, nope, rank)
    v_up: nn.Parameter  # (h, value, rank)

    @classmethod
    def ops(cls, config: LatentAttention, call: Call) -> list[tuple[str, Heads | None]]:
        if call.pooled:
            return [("write_pages", None), ("paged_attention", None)]
        sizes = Heads(config.key_dim, config.value_dim) if config.nope_dim else None  # before it is resolved
        return [("packed_attention" if call.packed else "attention", sizes)]

    def __init__(self, config: LatentAttention, design: ModelConfig):
        super().__init__(config, design)
        self.widths = list(config.rows().values())
        if config.query_rank is None:
            self.q_proj = None
        if config.query_rank is None or not config.latent_norm:
            self.q_norm = None
        if not config.latent_norm:
            self.kv_norm = None
        self.scale = config.key_dim**-0.5 if config.scale is None else config.scale

    def norms(self, design: ModelConfig) -> RMSNorm:
        found, eps = super().norms(design), self.config.norm_eps
        return found if eps is None else found.replace(eps=eps)

    def inner(
        self, x: Float[Tensor, "b t d"], context: Context, state: Latent | Pages | None
    ) -> tuple[Float[Tensor, "b t w"], Latent | Pages | None]:
        q, c, r = self.in_proj(x).split_with_sizes(self.widths, -1)
        if self.q_proj is not None:
            q = self.q_proj(q if self.q_norm is None else self.q_norm(q))
        c = c if self.kv_norm is None else self.kv_norm(c)
        q, c, r = q.unflatten(-1, (self.config.heads, -1)), c[:, :, None], r[:, :, None]
        if self.config.rope is not None:
            nope, rope = q.split_with_sizes((self.config.nope_dim, self.config.rope_dim), -1)
            rope, r = turn(torch.cat([rope, r], 2), self.config.rope, context).split_with_sizes((rope.shape[2], 1), 2)
            q = torch.cat([nope, rope], -1)
        if state is None:
            o = attention(q, *self.expanded(c, r), scale=self.scale, packing=context.packing)
        elif isinstance(state, Pages):
            o = self.pooled(q, c, r, context, state)
        else:
            o, state = over_all(q, [torch.cat([c, r], -1)], context, state, self.attend)
        return o.flatten(2), state

    def expanded(
        self, c: Float[Tensor, "b s 1 r"], r: Float[Tensor, "b s 1 p"]
    ) -> tuple[Float[Tensor, "b s h k"], Float[Tensor, "b s h v"]]:
        """Every head's keys and values."""
        k, v = (linear(c[:, :, 0], up.flatten(0, 1)).unflatten(-1, up.shape[:2]) for up in (self.k_up, self.v_up))
        return torch.cat([k, r.expand(-1, -1, k.shape[2], -1)], -1), v

    def absorbed(self, q: Float[Tensor, "b t h k"]) -> Float[Tensor, "b t h r+p"]:
        """Queries of what is kept, rather than of keys."""
        nope, rope = q.split_with_sizes((self.config.nope_dim, self.config.rope_dim), -1)
        return torch.cat([by_head(nope, self.k_up), rope], -1)

    def released(self, o: Float[Tensor, "b t h r+p"]) -> Float[Tensor, "b t h v"]:
        """Values, from the same sums of what is kept."""
        return by_head(o[..., : self.config.rank], self.v_up.mT)

    def absorbs(self, tokens: int) -> bool:
        """Whether so many new tokens do more work on keys and values that are spelled out: (nope + value) rank to do so and
        nope + rope + value to use them, for each old token, where latents take 2 rank + rope."""
        c = self.config
        short = c.nope_dim + c.value_dim
        return tokens * (2 * c.rank - short) < short * c.rank

    def attend(
        self, q: Tensor, kept: tuple[Tensor, ...], q_start: int | Tensor, k_start: int | Tensor | None
    ) -> Float[Tensor, "b t h v"]:
        (s,) = kept
        goes_on = isinstance(q_start, Tensor) or q_start > 0
        if goes_on and self.absorbs(
            q.shape[1]
        ):  # what is kept is the value, too, though the end is of no use: no copy is smaller
            o = attention(self.absorbed(q), s, s, q_start=q_start, k_start=k_start, scale=self.scale)
            return self.released(o)
        k, v = self.expanded(*s.split_with_sizes((self.config.rank, self.config.rope_dim), -1))
        return attention(q, k, v, q_start=q_start, k_start=k_start, scale=self.scale)

    def pooled(self, q: Tensor, c: Tensor, r: Tensor, context: Context, state: Pages) -> Tensor:
        """Write the new tokens into a pool and attend to what it holds of their rows."""
        (s,), table, ends = state.tensors().values(), context.table, context.ends
        if table is None:  # a row's one page is its own
            s = s[context.rows]
        latents, keys = s.split_with_sizes((self.config.rank, self.config.rope_dim), -1)
        write_pages(latents, keys, c, r, table, ends)
        return self.released(paged_attention(self.absorbed(q), s, s, table, ends, scale=self.scale))


def by_head(x: Float[Tensor, "b t h i"], weight: Float[Tensor, "h i o"]) -> Float[Tensor, "b t h o"]:
    """Each head times a matrix of its own."""
    b, t, h, _ = x.shape
    return torch.bmm(x.flatten(0, 1).transpose(0, 1), weight).transpose(0, 1).unflatten(0, (b, t))
