"""The loop over tokens by torch's own recurrent kernels (cuDNN on a GPU, oneDNN on a CPU), for the cells that are torch's.

What the solver falls back to for a dense LSTM, GRU or RNN that does not contract. The inputs are projected already, so the
module's input matrix is the identity, which orders (and for a GRU's z, which is 1 - z there, negates) our inputs as torch
has them. torch gives the outputs of all tokens but the states of the last only, so the way back runs it again.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from plait.ops.graph import autograd_inside
from plait.ops.packing import Packing
from plait.ops.shooting import cells
from plait.ops.shooting.cells import Bound

# our inputs in torch's order, and their signs
ORDER = {cells.RNN: ((0,), (1,)), cells.GRU: ((1, 0, 2), (1, -1, 1)), cells.LSTM: ((3, 0, 1, 2), (1, 1, 1, 1))}


def supports(cell: Bound) -> bool:
    """Whether torch has this cell: dense, without coupled gates or peepholes."""
    return type(cell.cell) in ORDER and cell.recurrent.shape[1] == 1 and cell.recurrent.ndim == 4 and _plain(cell)


def _plain(cell: Bound) -> bool:
    return not (isinstance(cell.cell, cells.LSTM) and (cell.cell.coupled or cell.cell.peephole))


@contextmanager
def _precise() -> Iterator[None]:
    """cuDNN's recurrences round float32 to TF32 by default; inside, only where torch's matrix products do so too."""
    rnn: Any = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    rnn.fp32_precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    try:
        yield
    finally:
        rnn.fp32_precision = before


@_precise()
def run(cell: Bound, x: Tensor, h0: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """x (b, t, g, 1, k), h0 (n, s, 1, k) -> h (b, t, 1, k) in x's dtype, the last states (n, s, 1, k). Differentiable."""
    (order, signs), k = ORDER[type(cell.cell)], x.shape[-1]
    g, rows = len(order), x if packing is None else packing.to_rows(x)
    module = _module(cell.cell, g * k, k, x)
    sign = x.new_tensor(signs).repeat_interleave(k)
    identity = torch.eye(g * k, dtype=x.dtype, device=x.device)
    zeros = x.new_zeros(g * k)
    weights = {
        "weight_ih_l0": identity.view(g, k, -1)[list(order)].flatten(0, 1) * sign[:, None],
        "weight_hh_l0": cell.recurrent[list(order), 0].flatten(0, 1).to(x.dtype) * sign[:, None],
        "bias_ih_l0": zeros,
        "bias_hh_l0": zeros if cell.bias is None else cell.bias[list(order), 0].flatten().to(x.dtype) * sign,
    }
    start: Any = tuple(h0[:, i, 0].to(x.dtype)[None].contiguous() for i in range(h0.shape[1]))
    inputs: Any = rows.flatten(2)
    if packing is not None:
        lengths = torch.tensor(packing.lengths, device="cpu")  # where torch wants them
        inputs = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
    with warnings.catch_warnings():  # cuDNN copies the weights side by side for itself, and says so each time
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        y, last = torch.func.functional_call(module, weights, (inputs, start if len(start) > 1 else start[0]))
    if packing is not None:
        y = packing.from_rows(pad_packed_sequence(y, batch_first=True)[0])
    last = torch.stack([part[0] for part in (last if isinstance(last, tuple) else (last,))], 1)
    return y.unsqueeze(2), last.unsqueeze(2).to(h0.dtype)


def _module(cell: cells.Cell, inputs: int, k: int, like: Tensor) -> nn.RNNBase:
    with torch.device("meta"):  # its own weights are never used
        if isinstance(cell, cells.RNN):
            return nn.RNN(inputs, k, nonlinearity=cell.activation, batch_first=True, dtype=like.dtype)
        return (nn.GRU if isinstance(cell, cells.GRU) else nn.LSTM)(inputs, k, batch_first=True, dtype=like.dtype)


@_precise()
def backward(
    cell: Bound, x: Tensor, h0: Tensor, grad: Tensor | None, grad_final: Tensor | None, packing: Packing | None
) -> list[Tensor]:
    """Gradients at x, h0 and the cell's tensors, from those at the outputs and the last states."""
    with autograd_inside():
        leaves = [w.detach().requires_grad_() for w in (x, h0, *cell.tensors())]
        h, final = run(cell.with_tensors(leaves[2:]), leaves[0], leaves[1], packing)
        pairs = [(y, g) for y, g in ((h, grad), (final, grad_final)) if g is not None]
        outputs, gradients = [y for y, _ in pairs], [g.to(y.dtype) for y, g in pairs]
        return list(torch.autograd.grad(outputs, leaves, gradients))
