"""Causal softmax attention (arXiv 1706.03762): o_i = sum_j softmax_j(q_i . k_j / sqrt(k)) v_j over the visible j."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.ops.attention import chunked, reference
from plait.ops.attention.fused import chosen, for_any_length, may_plan
from plait.ops.graph import by_documents
from plait.ops.kernels import Kernel, Kernels, always, choose
from plait.ops.packing import Packing

KERNELS = Kernels(
    "attention", (Kernel("chunked", chunked.run, always, chosen), Kernel("reference", reference.run, always))
)

Start = int | Int[Tensor, " b"]


@by_documents
def attention(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b s g k"],
    v: Float[Tensor, "b s g v"],
    *,
    q_start: Start = 0,
    k_start: Start = 0,
    window: int | None = None,
    softcap: float | None = None,
    packing: Packing | None = None,
) -> Float[Tensor, "b t h v"]:
    """`g` key heads serve h query heads in order (h a multiple).

    Query i stands at position q_start + i and key j at k_start + j, for all rows alike (int) or row by row (tensor).
    A query sees keys from position 0 up to its own; with `window`, only the last `window` of them. `softcap` c turns
    logits x into c tanh(x / c). With `packing` there is no past: each document attends to itself.
    """
    run: Callable[..., Tensor] = choose(KERNELS, q, packed=packing is not None).run
    arguments: tuple[Any, ...] = (q, k, v, q_start, k_start, window, softcap)
    if packing is not None:
        run, arguments = _packed, (run, q, k, v, window, softcap, packing)
    if may_plan(q, packing is not None):
        return run(*arguments)
    return for_any_length(run, *arguments)


def _packed(
    run: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    softcap: float | None,
    packing: Packing,
) -> Tensor:
    documents = [run(*(x[:, a:b] for x in (q, k, v)), 0, 0, window, softcap) for a, b in packing.bounds]
    return torch.cat(documents, 1)
