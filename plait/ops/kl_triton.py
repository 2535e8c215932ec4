"""KL of rows of logits as one Triton kernel, the gradient included; in float32 inside."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

import triton
import triton.language as tl
from torch import Tensor

from plait.ops.launch import kernel, launch

BLOCK = 2048  # logits at a time, of either model


@kernel
def divergence(y, theirs, weights, nats, dy, y_n, theirs_n, cold, V: tl.constexpr, BV: tl.constexpr):
    """A program does one row. The second pass over it reads what the first has left in the cache. `cold`: 1 / T."""
    row, v = tl.program_id(0).to(tl.int64), tl.arange(0, BV)
    weight = 1.0
    if weights is not None:
        weight = tl.load(weights + row)
    y += row * y_n
    theirs += row * theirs_n
    most, most_t = tl.full([BV], -3.0e38, tl.float32), tl.full([BV], -3.0e38, tl.float32)  # that a lane has seen
    total, total_t = tl.zeros([BV], tl.float32), tl.zeros([BV], tl.float32)  # of exponentials, below that
    apart = tl.zeros([BV], tl.float32)  # the teacher's exponentials times how far it is above
    for start in range(0, V, BV):
        x = tl.load(y + start + v, mask=start + v < V, other=-float("inf")).to(tl.float32) * cold
        t = tl.load(theirs + start + v, mask=start + v < V, other=-float("inf")).to(tl.float32) * cold
        above, above_t = tl.maximum(most, x), tl.maximum(most_t, t)
        total = total * tl.exp(most - above) + tl.exp(x - above)
        kept, e = tl.exp(most_t - above_t), tl.exp(t - above_t)
        total_t = total_t * kept + e
        apart = apart * kept + tl.where(e == 0.0, 0.0, e * (t - x))
        most, most_t = above, above_t
    top, top_t = tl.max(most, 0), tl.max(most_t, 0)
    total = tl.sum(total * tl.exp(most - top), 0)
    down = tl.exp(most_t - top_t)
    total_t, apart = tl.sum(total_t * down, 0), tl.sum(apart * down, 0)
    kl = apart / total_t - (top_t - top) - (tl.log(total_t) - tl.log(total))
    tl.store(nats + row, tl.where(weight == 0.0, 0.0, kl * weight / (cold * cold)))
    if dy is not None:
        dy += row * V
        share, share_t = weight / (total * cold), weight / (total_t * cold)
        for start in range(0, V, BV):
            x = tl.load(y + start + v, mask=start + v < V, other=-float("inf")).to(tl.float32) * cold
            t = tl.load(theirs + start + v, mask=start + v < V, other=-float("inf")).to(tl.float32) * cold
            grad = tl.exp(x - top) * share - tl.exp(t - top_t) * share_t
            grad = tl.where(weight == 0.0, 0.0, grad)
            tl.store(dy + start + v, grad.to(dy.dtype.element_ty), mask=start + v < V)


def run(y: Tensor, theirs: Tensor, weights: Tensor | None, T: float, nats: Tensor, dy: Tensor | None) -> None:
    """y, theirs (n, v), rows anywhere; weights (n), float32; nats (n) and dy (n, v) are written."""
    n, V = y.shape
    BV = min(BLOCK, triton.next_power_of_2(V))
    warps = max(1, min(8, BV // 256))
    cold = 1.0 / T
    launch(
        divergence, n, y, theirs, weights, nats, dy, y.stride(0), theirs.stride(0), cold, V=V, BV=BV, num_warps=warps
    )
