"""The selective scan (Mamba, arXiv 2312.00752, section 3): h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t, y_t = C_t h_t."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.ops.frame import Rows, recur
from plait.ops.kernels import Kernel, Kernels, always, full_precision, one_token, wide
from plait.ops.packing import Packing
from plait.ops.selective import chunked, reference, step, tokens
from plait.ops.summary import Elementwise

KERNELS = Kernels(
    "selective",
    (
        Kernel("step", step.run, one_token, wide=True),
        Kernel("chunked", chunked.run, always, wide=True),
        Kernel("tokens", tokens.run, tokens.fits, wide=True),  # which benchmarks/scans_gpu.py is to hold on a GPU first
        Kernel("reference", reference.run, always, wide=True),
    ),
)


def selective_scan(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d k"],
    B: Float[Tensor, "b t k"],
    C: Float[Tensor, "b t k"],
    *,
    state: Float[Tensor, "n d k"] | None = None,
    rows: Rows | None = None,
    packing: Packing | None = None,
    at: Int[Tensor, " m"] | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "n d k"] | None, *tuple[Float[Tensor, "b m d k"], ...]]:
    """Outputs and, where a state was given, the state after the last token: k numbers for each channel.

    dt is positive and A negative, one for each number of a channel. Computed in float32, or float64 for float64 inputs. n is
    the batch, or the documents packed. With `rows`, `state` is a pool's (`plait.ops.frame`). With `at`, numbers of tokens,
    the states after these come third.
    """
    sizes = A.shape[1] if x.is_cuda else None
    return recur(KERNELS, x, (x, dt, A, B, C), state, rows, packing, at=at, sizes=sizes)


def summary(
    x: Float[Tensor, "b t d"], dt: Float[Tensor, "b t d"], A: Float[Tensor, "d k"], B: Float[Tensor, "b t k"]
) -> Elementwise:
    """What `selective_scan` of these tokens does to any state before them."""
    with full_precision(x.device):
        x, dt, A, B = wide(x), wide(dt), wide(A), wide(B)
        zero = x.new_zeros(x.shape[0], *A.shape)
        _, final = chunked.run(x, dt, A, B, torch.zeros_like(B), state=zero, packing=None)
        assert final is not None  # a state was given
        return Elementwise((dt.sum(1)[..., None] * A).exp(), final)
