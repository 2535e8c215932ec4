"""mLSTM on a GPU, for training and prompts.

C q comes from the kernels of the scalar-decay recurrence (`plait.ops.chunks_gpu`). n q, by which it is divided, is taken in
float32: it may cancel to little, and what was rounded before then counts for much.
"""

import torch
from torch import Tensor

from plait.ops import chunks_gpu, ssd
from plait.ops.kernels import Call, wide
from plait.ops.mlstm.gates import divided, last_of, stabilised, with_m
from plait.ops.packing import Packing


def fits(call: Call) -> str | None:
    """None, or why the kernels do not fit."""
    reason = chunks_gpu.fits(call)
    if reason is None and call.dtype != torch.bfloat16:
        return f"computes in bfloat16, the inputs are {call.dtype}, which is too narrow for small input gates"
    return reason


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `mlstm`."""
    C, n, m = (None, None, None) if state is None else state.split([v.shape[3], 1, 1], 2)
    m, g, factor = stabilised(wide(i), wide(f), None if m is None else m[:, :, 0, 0], packing)
    written = (v * factor[..., None]).to(v.dtype)
    o, C = chunks_gpu.run(q, k, written, g, state=C, packing=packing, scale=scale)
    nq, n = ssd.chunked.run(wide(q) * scale, wide(k), factor[..., None], g, state=n, packing=packing)
    h = divided(wide(o), nq[..., 0], m)
    return h, None if C is None or n is None else with_m(torch.cat([C, n], 2), last_of(m, packing))
