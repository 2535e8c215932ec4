"""Causal softmax attention (arXiv 1706.03762): o_i = sum_j softmax_j(q_i . k_j / sqrt(k)) v_j over the visible j."""

from jaxtyping import Float, Int
from torch import Tensor

from plait.ops.attention import chunked, packed, reference
from plait.ops.attention.fused import chosen, for_any_length, may_plan
from plait.ops.attention.packed import Heads as Heads
from plait.ops.kernels import Kernel, Kernels, always, choose
from plait.ops.packing import Packing

KERNELS = Kernels(
    "attention", (Kernel("chunked", chunked.run, always, chosen), Kernel("reference", reference.run, always))
)

PACKED = Kernels(
    "packed_attention",
    (
        Kernel("varlen", packed.run, packed.supports, packed.within),
        Kernel("chunked", packed.one_by_one("chunked"), always),
        Kernel("reference", packed.one_by_one("reference"), always),
    ),
)

Start = int | Int[Tensor, " b"]


def attention(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b s g k"],
    v: Float[Tensor, "b s g v"],
    *,
    q_start: Start = 0,
    k_start: Start = 0,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    packing: Packing | None = None,
) -> Float[Tensor, "b t h v"]:
    """`g` key heads serve h query heads in order (h a multiple).

    Query i stands at position q_start + i and key j at k_start + j, for all rows alike (int) or row by row (tensor).
    A query sees keys from position 0 up to its own; with `window`, only the last `window` of them. `softcap` c turns
    logits x into c tanh(x / c). scale: on q . k, 1 / sqrt(k) if left out. With `packing` there is no past: each document
    attends to itself.
    """
    if packing is not None:
        heads = Heads(k.shape[3], v.shape[3], softcap is not None)
        return choose(PACKED, q, packed=True, sizes=heads).run(q, k, v, window, softcap, scale, packing)
    run, arguments = choose(KERNELS, q).run, (q, k, v, q_start, k_start, window, softcap, scale)
    return run(*arguments) if may_plan(q) else for_any_length(run, *arguments)
