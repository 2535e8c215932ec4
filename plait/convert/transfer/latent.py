"""Attention to latent attention: one decomposition of keys and values together (X-EcoMLA, arXiv 2503.11132; Zebra-Llama).

A head's positions turn channel pairs (i, i + r/2). Zebra-Llama gives the first half of each head's rows to the part without
positions and the last to the part with: that splits every pair, so that even at full rank nothing is kept. Here whole pairs
change sides, those whose speed is that of a pair of the new layer; what is lost is that the others stop turning, and that all
heads share one key with positions.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from plait.convert.transfer.parts import Heads, fill, heads_of, put_output
from plait.design.layers import Attention, LatentAttention
from plait.design.norms import RMSNorm
from plait.layers.attention import AttentionLayer
from plait.layers.latent_attention import LatentAttentionLayer
from plait.layers.norm import Norm
from plait.layers.rope import frequencies


def to_latent(old: AttentionLayer, new: LatentAttentionLayer) -> None:
    """Exact where nothing turns, latents are not normed and the rank is full; and where all of a head turns, with one key."""
    c, heads = new.config, heads_of(old)
    still, turned = split(old.config, c)
    q_turned, k_turned = shared_key(heads, turned, old.config, c)
    up, down = joint(heads, still)
    rank, nope = min(c.rank, len(down)), len(still)
    down = down[:rank]
    up = up[..., :rank].repeat_interleave(c.heads // len(up), 0)
    rows = {"kv": _rows(new, "kv", down), "k_rope": _rows(new, "k_rope", k_turned)}
    for parameter, values in ((new.k_up, up[:, :nope]), (new.v_up, up[:, nope:])):
        parameter.data.zero_()[:, : values.shape[1], :rank] = values
    _put_queries(new, _queries(heads.q[:, still], q_turned, c), rows)
    if new.kv_norm is not None:  # which takes away how large a latent is: what is left is how large they are on average
        _set(new.kv_norm, math.sqrt(float(down.square().sum()) / c.rank))
    put_output(new, heads.o)


def split(old: Attention, new: LatentAttention) -> tuple[list[int], list[int]]:
    """A head's channels that go where nothing turns, and those that turn, first members of pairs first."""
    d = old.head_dim
    if old.rope is None or new.rope is None:
        return list(range(min(new.nope_dim, d))), list(range(new.nope_dim, d))
    pairs = old.rope.rotated(d) // 2
    theirs, _ = frequencies(old.rope, 2 * pairs, torch.device("cpu"), torch.float64)
    ours, _ = frequencies(new.rope, new.rope.rotated(new.rope_dim), torch.device("cpu"), torch.float64)
    left, chosen = set(range(pairs)), []
    for speed in ours[:pairs].log().tolist():
        chosen.append(min(left, key=lambda i: abs(float(theirs[i].log()) - speed)))
        left.discard(chosen[-1])
    turned = [*chosen, *(i + pairs for i in chosen)]
    return [i for i in range(d) if i not in turned][: new.nope_dim], turned


def joint(heads: Heads, still: list[int]) -> tuple[Float[Tensor, "g n+v r"], Float[Tensor, "r d"]]:
    """Of each group's still keys and its values: what reads them off the latent, and what makes it, the largest part first."""
    both = torch.cat([heads.k[:, still], heads.v], 1)
    u, s, v = torch.linalg.svd(both.flatten(0, 1), full_matrices=False)
    return u.unflatten(0, both.shape[:2]), s[:, None] * v


def shared_key(
    heads: Heads, turned: list[int], old: Attention, new: LatentAttention
) -> tuple[Float[Tensor, "h p d"], Float[Tensor, "p d"]]:
    """The one key of all groups that turns, and each head's queries of it.

    A pair is a complex number, and a turn commutes with what a query multiplies it by: of the groups' keys the nearest matrix
    of rank 1 is taken, so that groups may differ by a turn and a length.
    """
    groups, half = len(heads.k), len(turned) // 2
    if old.rope is None or new.rope is None:
        pick = heads.k[:, turned].transpose(0, 1)  # (p, g, d)
        queries = heads.q[:, turned]
    else:
        first, second = turned[:half], turned[half:]
        pick = torch.complex(heads.k[:, first], heads.k[:, second]).transpose(0, 1)
        queries = torch.complex(heads.q[:, first], heads.q[:, second])
    if not turned:
        return heads.q[:, turned], heads.k[0, turned]
    u, s, v = torch.linalg.svd(pick, full_matrices=False)
    factor = (u[..., 0] * groups**0.5).T.repeat_interleave(len(heads.q) // groups, 0)  # (h, p)
    key, queries = v[:, 0] * (s[:, :1] * groups**-0.5), queries * factor.conj()[..., None]
    if not key.is_complex():
        return queries, key
    return torch.cat([queries.real, queries.imag], 1), torch.cat([key.real, key.imag], 0)


def _queries(still: Tensor, turned: Tensor, c: LatentAttention) -> Float[Tensor, "h k d"]:
    """Zeros for channels of a key that the old layer has none of."""
    q = still.new_zeros(c.heads, c.key_dim, still.shape[-1])
    q[:, : still.shape[1]] = still
    q[:, c.nope_dim : c.nope_dim + turned.shape[1]] = turned
    return q


def _put_queries(new: LatentAttentionLayer, q: Float[Tensor, "h k d"], rows: dict[str, Tensor]) -> None:
    if new.q_proj is None:
        fill(new.in_proj, rows | {"q": q.flatten(0, 1)})
        return
    u, s, v = torch.linalg.svd(q.flatten(0, 1), full_matrices=False)
    low = min(len(s), new.q_proj.in_features)
    down = s[:low, None] * v[:low]
    fill(new.in_proj, rows | {"q": _rows(new, "q", down)})
    new.q_proj.weight.data.zero_()[:, :low] = u[:, :low]
    if new.q_norm is not None:
        _set(new.q_norm, math.sqrt(float(down.square().sum()) / new.q_proj.in_features))


def _rows(new: LatentAttentionLayer, part: str, values: Tensor) -> Tensor:
    """The values, and below them what was drawn."""
    sizes = new.config.rows()
    drawn = dict(zip(sizes, new.in_proj.weight.data.split([*sizes.values()]), strict=True))[part]
    return torch.cat([values.to(drawn.dtype), drawn[len(values) :]])


def _set(norm: Norm, value: float) -> None:
    centred = isinstance(norm.config, RMSNorm) and norm.config.zero_centered
    norm.weight.data.fill_(value - (1 if centred else 0))
