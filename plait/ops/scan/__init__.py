"""The elementwise recurrence s_t = a_t s_{t-1} + b_t (arXiv 2402.19427, section 2.4; arXiv 2410.01201, section 2.3)."""

from jaxtyping import Float, Int
from torch import Tensor

from plait.ops.frame import Rows, recur
from plait.ops.kernels import Kernel, Kernels, always, full_precision, one_token, wide
from plait.ops.packing import Packing
from plait.ops.scan import chunked, reference, step, tiles
from plait.ops.summary import Elementwise

KERNELS = Kernels(
    "scan",
    (
        Kernel("step", step.run, one_token, wide=True),
        Kernel("chunked", chunked.run, always, wide=True),
        Kernel("tiles", tiles.run, tiles.fits, wide=True),  # which benchmarks/scans_gpu.py is to hold on a GPU first
        Kernel("reference", reference.run, always, wide=True),
    ),
)


def scan(
    a: Float[Tensor, "b t *u"],
    b: Float[Tensor, "b t *u"],
    *,
    state: Float[Tensor, "n *u"] | None = None,
    rows: Rows | None = None,
    packing: Packing | None = None,
    at: Int[Tensor, " m"] | None = None,
) -> tuple[Float[Tensor, "b t *u"], Float[Tensor, "n *u"] | None, *tuple[Float[Tensor, "b m *u"], ...]]:
    """The states after all tokens and, where a state was given, a copy of the last.

    a is within [-1, 1], 0 and subnormal numbers included; nothing is divided by it and no logarithm taken. Computed in
    float32, or float64 for float64 inputs. n is the batch, or the documents packed. With `rows`, `state` is a pool's
    (`plait.ops.frame`). With `at`, numbers of tokens, the states after these come third, at least float32.
    """
    return recur(KERNELS, b, (a, b), state, rows, packing, at=at)


def summary(a: Float[Tensor, "b t *u"], b: Float[Tensor, "b t *u"]) -> Elementwise:
    """What `scan` of these tokens does to any state before them."""
    with full_precision(a.device):
        a, b = wide(a), wide(b)
        states, _ = chunked.run(a, b, state=None, packing=None)
        return Elementwise(a.prod(1), states[:, -1])
