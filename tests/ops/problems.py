"""Every recurrence on random tokens, as a function of its state."""

import torch
import torch.nn.functional as F

from plait.ops.conv import causal_conv
from plait.ops.delta import gated_delta
from plait.ops.gla import dplr, gla
from plait.ops.mlstm import mlstm as mlstm_op
from plait.ops.scan import scan
from plait.ops.selective import selective_scan
from plait.ops.shooting import LSTM, SLSTM, shooting
from plait.ops.ssd import ssd

B, POOL, H, G, K, V, D = 3, 7, 4, 2, 6, 5, 8


def conv(t, dtype, count=None):
    x, weight, bias = torch.randn(B, t, D, dtype=dtype)[:, :count], torch.randn(D, 4), torch.randn(D)
    return lambda **state: causal_conv(x, weight, bias, **state), (3, D)


def linear(op):
    def make(t, dtype, count=None):
        q, k = (F.normalize(torch.randn(B, t, G, K, dtype=dtype), dim=-1) for _ in range(2))
        gates = [-torch.rand(B, t, H, dtype=dtype), *([torch.rand(B, t, H, dtype=dtype)] if op is gated_delta else [])]
        inputs = [x[:, :count] for x in (q, k, torch.randn(B, t, H, V, dtype=dtype), *gates)]
        return lambda **state: op(*inputs, **state), (H, V, K)

    return make


def mlstm(t, dtype, count=None):
    q, k = (torch.randn(B, t, H, K, dtype=dtype) for _ in range(2))
    v, i, f = torch.randn(B, t, H, V, dtype=dtype), *(3 * torch.randn(B, t, H, dtype=dtype) for _ in range(2))
    return lambda **state: mlstm_op(*(x[:, :count] for x in (q, k, v, i, f)), **state), (H, V + 2, K)


def elementwise(t, dtype, count=None):
    a, b = (x[:, :count] for x in (torch.rand(B, t, H, K, dtype=dtype), torch.randn(B, t, H, K, dtype=dtype)))
    return lambda **state: scan(a, b, **state), (H, K)


def selective(t, dtype, count=None):
    x, dt = torch.randn(B, t, D, dtype=dtype), torch.rand(B, t, D, dtype=dtype)
    reads = (torch.randn(B, t, K, dtype=dtype) for _ in range(2))
    A = -torch.rand(D, K)
    x, dt, *reads = (y[:, :count] for y in (x, dt, *reads))
    return lambda **state: selective_scan(x, dt, A, *reads, **state), (D, K)


def channels(op):
    """With a decay per key channel."""

    def make(t, dtype, count=None):
        q, k, z = (F.normalize(torch.randn(B, t, H, K, dtype=dtype), dim=-1) for _ in range(3))
        v, g, beta = (
            torch.randn(B, t, H, V, dtype=dtype),
            -torch.rand(B, t, H, K, dtype=dtype),
            torch.rand(B, t, H, dtype=dtype),
        )
        more = {gla: [], dplr: [-z, beta[..., None] * z], gated_delta: [beta]}[op]
        inputs = [x[:, :count] for x in (q, k, v, g, *more)]
        return lambda **state: op(*inputs, **state), (H, V, K)

    return make


def nonlinear(cell):
    def make(t, dtype, count=None):
        g = len(cell.inputs)
        x, bound = torch.randn(B, t, g, 2, 4, dtype=dtype)[:, :count], cell.bind(torch.randn(g, 2, 4, 4) / 4)

        def run(**state):
            h, last, _, *states = shooting(bound, x, **state)
            return h, last, *states

        return run, (len(cell.states), 2, 4)

    return make


OPS = {
    "conv": conv,
    "ssd": linear(ssd),
    "delta": linear(gated_delta),
    "mlstm": mlstm,
    "scan": elementwise,
    "selective": selective,
    "kda": channels(gated_delta),
    "gla": channels(gla),
    "dplr": channels(dplr),
    "lstm": nonlinear(LSTM()),
    "slstm": nonlinear(SLSTM()),
}
ROWS = {
    "a slice": slice(2, 5),
    "all": slice(None, B),
    "every second": slice(1, 7, 2),
    "any order": torch.tensor([5, 0, 3]),
}


def problem(name, tokens, dtype=torch.float32):
    """The op on so many random tokens (of which the first `count` are made use of) as a function of its state, and a pool."""
    torch.manual_seed(tokens)
    op, shape = OPS[name](tokens, dtype)
    return op, torch.randn(POOL, *shape)
