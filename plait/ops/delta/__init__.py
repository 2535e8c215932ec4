"""The gated delta rule (arXiv 2412.06464, eq. 10): S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T, o_t = S_t q_t."""

from jaxtyping import Float
from torch import Tensor

from plait.ops.delta import chunked, reference, step
from plait.ops.frame import Rows, recur
from plait.ops.kernels import Kernel, always, many_tokens, one_token, wide
from plait.ops.packing import Packing

KERNELS = (
    Kernel("step", step.run, one_token),
    Kernel("chunked", chunked.run, many_tokens),
    Kernel("reference", reference.run, always),
)


def gated_delta(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    g: Float[Tensor, "b t h"],
    beta: Float[Tensor, "b t h"],
    *,
    state: Float[Tensor, "n h v k"] | None = None,
    rows: Rows | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "n h v k"] | None]:
    """Outputs and, where a state was given, the state after the last token.

    g is the log decay, log a <= 0. `g` key heads serve h value heads in order (h a multiple). Computed in float32, or
    float64 for float64 inputs. n is the batch, or the number of documents with `packing`. With `rows`, `state` is a
    pool's (`plait.ops.frame`).
    """
    inputs = wide(q), wide(k), wide(v), wide(g), wide(beta)
    o, state = recur(KERNELS, v, inputs, state=state, rows=rows, packing=packing)
    return o, state
