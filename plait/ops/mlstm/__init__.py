"""mLSTM (xLSTM, arXiv 2405.04517, equations 19 to 27): C_t = f_t C_{t-1} + i_t v_t k_t^T, n_t = f_t n_{t-1} + i_t k_t,
h_t = C_t q_t / max(|n_t q_t|, 1), with f = sigmoid(f~) and i = exp(i~)."""

from jaxtyping import Float, Int
from torch import Tensor

from plait.ops import chunks_gpu
from plait.ops.frame import Rows, recur
from plait.ops.kernels import Kernel, Kernels, always, full_precision, one_token, wide
from plait.ops.mlstm import chunked, chunks, reference
from plait.ops.mlstm.summary import Summary
from plait.ops.packing import Packing

KERNELS = Kernels(
    "mlstm",
    (
        Kernel("step", chunked.step, one_token, wide=True),
        Kernel("chunks", chunks.run, chunks.fits),
        Kernel("chunked", chunked.run, always, wide=True),
        Kernel("reference", reference.run, always, wide=True),
    ),
)


def mlstm(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    i: Float[Tensor, "b t h"],
    f: Float[Tensor, "b t h"],
    *,
    scale: float | None = None,
    state: Float[Tensor, "n h v+2 k"] | None = None,
    rows: Rows | None = None,
    packing: Packing | None = None,
    at: Int[Tensor, " m"] | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "n h v+2 k"] | None, *tuple[Float[Tensor, "b m h v+2 k"], ...]]:
    """Outputs and, where a state was given, the state after the last token: the rows of C, then n, both times exp(-m), then m
    in every column. m is the stabiliser, so that no gate overflows: m_t = max(log f_t + m_{t-1}, i~_t), from 0.

    i and f come before their exponential and sigmoid. scale: on q, 1 if left out. n is the batch, or the documents packed. With
    `rows`, `state` is a pool's (`plait.ops.frame`). With `at`, numbers of tokens, the states after these come third.
    """
    sizes = chunks_gpu.sizes_of(k, v)
    return recur(KERNELS, v, (q, k, v, i, f), state, rows, packing, scale=scale, at=at, sizes=sizes)


def summary(
    k: Float[Tensor, "b t h k"], v: Float[Tensor, "b t h v"], i: Float[Tensor, "b t h"], f: Float[Tensor, "b t h"]
) -> Summary:
    """What `mlstm` of these tokens does to any state before them: one product over all of them, no loop."""
    with full_precision(k.device):
        return Summary.of(*(wide(x) for x in (k, v, i, f)))
