"""Cross-entropy of rows of logits as one Triton kernel, the gradient included; in float32 inside."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

import triton
import triton.language as tl
from torch import Tensor

from plait.ops.launch import kernel, launch

BLOCK = 4096  # logits at a time


@kernel
def softmax_loss(y, targets, nats, dy, y_n, V: tl.constexpr, BV: tl.constexpr):
    """A program does one row. The second pass over it reads what the first has left in the cache."""
    row, v = tl.program_id(0).to(tl.int64), tl.arange(0, BV)
    target = tl.load(targets + row)
    y += row * y_n
    most = tl.full([BV], -3.0e38, tl.float32)  # of the numbers that a lane has seen, and their sum below that
    total = tl.zeros([BV], tl.float32)
    for start in range(0, V, BV):
        x = tl.load(y + start + v, mask=start + v < V, other=-float("inf")).to(tl.float32)
        above = tl.maximum(most, x)
        total = total * tl.exp(most - above) + tl.exp(x - above)
        most = above
    top = tl.max(most, 0)
    total = tl.sum(total * tl.exp(most - top), 0)
    own = tl.load(y + tl.maximum(target, 0)).to(tl.float32)
    tl.store(nats + row, tl.where(target >= 0, top - own + tl.log(total), 0.0))
    if dy is not None:
        dy += row * V
        share = tl.where(target >= 0, 1.0 / total, 0.0)
        for start in range(0, V, BV):
            x = tl.load(y + start + v, mask=start + v < V, other=-float("inf")).to(tl.float32)
            p = tl.exp(x - top) * share - tl.where(start + v == target, 1.0, 0.0)
            tl.store(dy + start + v, p.to(dy.dtype.element_ty), mask=start + v < V)


def run(y: Tensor, targets: Tensor, nats: Tensor, dy: Tensor | None) -> None:
    """y (n, v), its rows anywhere; targets (n), negative where a row is not scored; nats (n) and dy (n, v) are written."""
    n, V = y.shape
    BV = min(BLOCK, triton.next_power_of_2(V))
    launch(softmax_loss, n, y, targets, nats, dy, y.stride(0), V=V, BV=BV, num_warps=max(1, min(8, BV // 512)))
