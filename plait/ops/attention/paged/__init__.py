"""Attention of a few new tokens to keys and values that lie in pages (arXiv 2309.06180), in a pool that all rows share.

A row's keys j * page ... (j + 1) * page - 1 lie on page `table[row, j]`. Everything that changes from token to token is a
device tensor, so that a step can be captured in a CUDA graph and serves all lengths.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.ops.attention.paged import gathered, reference, sliced, write
from plait.ops.kernels import FEW, Call, Kernel, Kernels, always, choose
from plait.ops.operator import operator


class Paged(NamedTuple):
    """What the forms ask about a call's sizes."""

    key: int  # size of a head
    value: int
    stored: torch.dtype
    contiguous: bool  # the channels of a head, in all tensors


@operator("paged_attention")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    lengths: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    from plait.ops.attention.paged import triton

    return triton.run(q, k, v, table, lengths, scale, window, softcap, sinks)


@torch.library.register_fake("plait::paged_attention")
def _(q, k, v, table, lengths, scale, window, softcap, sinks):
    return q.new_empty(*q.shape[:3], v.shape[3])


@operator("write_pages", mutates=("k_pages", "v_pages"))
def _write(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, table: Tensor | None, lengths: Tensor) -> None:
    from plait.ops.attention.paged import triton

    triton.write(k_pages, v_pages, k, v, table, lengths)


@torch.library.register_fake("plait::write_pages")
def _(k_pages, v_pages, k, v, table, lengths):
    return None


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST = 256


def _triton(call: Call) -> str | None:
    if call.device != "cuda":
        return "needs an NVIDIA GPU"
    if call.tokens == "many":
        return f"for at most {FEW} new tokens a row"
    return "it has no gradients" if call.gradients else _fits(call)


def _fits(call: Call) -> str | None:
    if (paged := call.sizes) is None:
        return None
    if not {call.dtype, paged.stored} <= set(DTYPES):
        return f"no kernel for {call.dtype} with pages of {paged.stored}"
    if max(paged.key, paged.value) > LARGEST:
        return f"heads of {max(paged.key, paged.value)} are above {LARGEST}"
    return None if paged.contiguous else "a head's channels are not contiguous"


def _host(call: Call) -> str | None:
    if call.device != "cpu":
        return "the host would wait for the device's lengths"
    return "a compiled graph is for all lengths" if torch.compiler.is_compiling() else None


KERNELS = Kernels(
    "paged_attention",
    (
        Kernel("triton", _attention, _triton),
        Kernel("sliced", sliced.run, _host),
        Kernel("gathered", gathered.run, always),
        Kernel("reference", reference.run, always),
    ),
)
WRITERS = Kernels(
    "write_pages",
    (Kernel("triton", _write, _triton), Kernel("sliced", write.sliced, _host), Kernel("reference", write.run, always)),
)


def paged_attention(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "pages page g k"],
    v: Float[Tensor, "pages page g v"],
    table: Int[Tensor, "b n"] | None,
    lengths: Int[Tensor, " b"],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b t h v"]:
    """`g` key heads serve h query heads in order (h a multiple). `lengths` (int64) count the t new tokens, whose keys are in
    the pages already: query i of a row stands at lengths - t + i and sees the keys up to its own; with `window`, only the last
    `window` of them. `table` (int32) None: row i's keys lie on page i.

    scale: on q . k, 1 / sqrt(k) if left out. softcap c turns logits x into c tanh(x / c). sinks: one more logit per head, which
    takes its part of the softmax and has no value. A row with less than t tokens (one that is not alive) counts as having t.
    What pages hold past a row's length must be finite, unless the kernel is "triton", which does not read it.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return _chosen(KERNELS, q, k, v).run(q, k, v, table, lengths, scale, window, softcap, sinks)


def write_pages(
    k_pages: Float[Tensor, "pages page g k"],
    v_pages: Float[Tensor, "pages page g v"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t g v"],
    table: Int[Tensor, "b n"] | None,
    lengths: Int[Tensor, " b"],
) -> None:
    """Put t new tokens per row where `paged_attention` with the same table and lengths finds them.

    Rows that are not alive write too: their table should point at a page that nobody reads. Positions past the table's end are
    its last, so whoever writes further has to see to it that there is room.
    """
    _chosen(WRITERS, k, k_pages, v_pages, v).run(k_pages, v_pages, k, v, table, lengths)


def writer(x: Tensor, k_pages: Tensor, v_pages: Tensor, v: Tensor) -> str:
    """The form by which `write_pages` would write new tokens x (b, t, ...)."""
    return _chosen(WRITERS, x, k_pages, v_pages, v).name


def _chosen(kernels: Kernels, x: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Kernel:
    """For new tokens x (b, t, ...) and the pages."""
    tensors = (x, k, v, *others)
    gradients = torch.is_grad_enabled() and any(y.requires_grad for y in tensors)
    return choose(kernels, x, pooled=True, gradients=gradients, sizes=sizes_of(*tensors))


def sizes_of(x: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Paged:
    contiguous = {y.stride(-1) for y in (x, k, v, *others)} == {1}
    return Paged(k.shape[3], v.shape[3], k.dtype, contiguous)
