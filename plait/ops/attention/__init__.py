"""Causal softmax attention (arXiv 1706.03762): o_i = sum_j softmax_j(q_i . k_j / sqrt(k)) v_j over the visible j."""

from jaxtyping import Float, Int
from torch import Tensor

from plait.ops.attention import chunked, one_by_one, packed, reference
from plait.ops.attention.fused import chosen, for_any_length, may_plan
from plait.ops.attention.packed import Heads as Heads
from plait.ops.kernels import Kernel, Kernels, always, choose
from plait.ops.packing import Packing

KERNELS = Kernels(
    "attention",
    (
        Kernel("varlen", packed.rows, packed.for_rows, packed.within),
        Kernel("chunked", chunked.run, always, chosen),
        Kernel("reference", reference.run, always),
    ),
)

PACKED = Kernels(
    "packed_attention",
    (
        Kernel("varlen", packed.run, packed.supports, packed.within),
        Kernel("chunked", one_by_one.by("chunked"), always),
        Kernel("reference", one_by_one.by("reference"), always),
    ),
)

Start = int | Int[Tensor, " b"]


def attention(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b s g k"],
    v: Float[Tensor, "b s g v"],
    *,
    q_start: Start = 0,
    k_start: Start | None = None,
    window: int | None = None,
    prefix: int = 0,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    packing: Packing | None = None,
) -> Float[Tensor, "b t h v"]:
    """`g` key heads serve h query heads in order (h a multiple).

    Query i stands at position q_start + i and key j at k_start + j, for all rows alike (int) or row by row (tensor).
    A query sees keys from position 0 up to its own; with `window`, only the last `window` of them and the first `prefix` of all
    (arXiv 2309.17453). These first keys come first of all, and k_start is where the keys after them stand (left out: all are in
    order); what those hold at the first positions once more is not looked at. `softcap` c turns logits x into
    c tanh(x / c). scale: on q . k, 1 / sqrt(k) if left out. sinks: one more logit per head, which takes its part of the softmax
    and has no value. With `packing` there is no past: each document attends to itself.
    """
    prefix = 0 if window is None else prefix
    scale = q.shape[3] ** -0.5 if scale is None else scale
    heads = Heads(k.shape[3], v.shape[3], softcap is not None, sinks is not None, prefix > 0)
    if sinks is not None or prefix:
        past = k_start is not None or isinstance(q_start, Tensor) or q_start > 0 or k.shape[1] > q.shape[1]
        heads = heads._replace(past=past)
    if packing is not None:
        run = choose(PACKED, q, packed=True, sizes=heads).run
        return run(q, k, v, sinks, window, prefix, softcap, scale, packing)
    k_start = min(prefix, k.shape[1]) if k_start is None else k_start
    run, arguments = (
        choose(KERNELS, q, sizes=heads).run,
        (q, k, v, sinks, q_start, k_start, window, prefix, softcap, scale),
    )
    return run(*arguments) if may_plan(q) else for_any_length(run, *arguments)
