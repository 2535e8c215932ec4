"""What attention does to the new tokens of a pool before it looks: queries and keys are normed and turned by position, keys and
values written to their pages. One kernel for a decoding step on a GPU, where each of these would be one."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.ops.attention.paged import writer
from plait.ops.operator import operator
from plait.ops.token import few_rows


def fits(qk: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor) -> bool:
    """Whether new keys would be written by a kernel anyway, and rows are those of a step."""
    return few_rows(qk, v) and writer(qk, k_pages, v_pages, v) == "triton"


def place(
    qk: Float[Tensor, "b t h+g k"],
    v: Float[Tensor, "b t g v"],
    cos: Float[Tensor, "b t 1 1 r/2"],
    sin: Float[Tensor, "b t 1 2 r/2"],
    k_pages: Float[Tensor, "pages page g k"],
    v_pages: Float[Tensor, "pages page g v"],
    table: Int[Tensor, "b n"] | None,
    lengths: Int[Tensor, " b"],
    *,
    norms: tuple[Float[Tensor, " k"], Float[Tensor, " k"]] | None = None,
    eps: float = 0.0,
    zero_centered: bool = False,
) -> Float[Tensor, "b t h k"]:
    """The queries, after `rms_norm` by the first of `norms` and `rotate`; keys likewise by the second, then `write_pages`."""
    q_norm, k_norm = norms or (None, None)
    turns = cos.contiguous(), sin.contiguous()
    return _place(qk, v, *turns, q_norm, k_norm, eps, zero_centered, k_pages, v_pages, table, lengths)


@operator("place_heads", mutates=("k_pages", "v_pages"))
def _place(
    qk: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    zero_centered: bool,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor | None,
    lengths: Tensor,
) -> Tensor:
    from plait.ops.attention.paged import placed_triton

    q = _queries(qk, v)
    placed_triton.run(qk, v, cos, sin, q_norm, k_norm, eps, zero_centered, q, k_pages, v_pages, table, lengths)
    return q


@torch.library.register_fake("plait::place_heads")
def _(qk, v, cos, sin, q_norm, k_norm, eps, zero_centered, k_pages, v_pages, table, lengths):
    return _queries(qk, v)


def _queries(qk: Tensor, v: Tensor) -> Tensor:
    b, t, heads, k = qk.shape
    return qk.new_empty(b, t, heads - v.shape[2], k)
