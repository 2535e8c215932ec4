"""State space duality (Mamba-2, arXiv 2405.21060, section 6): S_t = a_t S_{t-1} + v_t k_t^T, o_t = S_t q_t."""

from jaxtyping import Float
from torch import Tensor

from plait.ops.frame import Rows, recur
from plait.ops.kernels import Kernel, always, many_tokens, one_token, wide
from plait.ops.packing import Packing
from plait.ops.ssd import chunked, reference, step

KERNELS = (
    Kernel("step", step.run, one_token),
    Kernel("chunked", chunked.run, many_tokens),
    Kernel("reference", reference.run, always),
)


def ssd(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    g: Float[Tensor, "b t h"],
    *,
    state: Float[Tensor, "n h v k"] | None = None,
    rows: Rows | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "n h v k"] | None]:
    """Outputs and, where a state was given, the state after the last token.

    In Mamba-2's letters q is C, k is B, v is dt x and g = dt A, the log decay, one per head. `g` groups of q and k serve
    h heads in order (h a multiple). Computed in float32, or float64 for float64 inputs. n is the batch, or the documents
    packed. With `rows`, `state` is a pool's (`plait.ops.frame`).
    """
    inputs = wide(q), wide(k), wide(v), wide(g)
    o, state = recur(KERNELS, v, inputs, state=state, rows=rows, packing=packing)
    return o, state
