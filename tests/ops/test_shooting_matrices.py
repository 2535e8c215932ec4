"""Recurrences with a matrix per head on the GPU's kernels, in Triton's interpreter, against the loop in float64."""

import pytest
import torch

from plait.ops.kernels import Call
from plait.ops.packing import Packing
from plait.ops.shooting import GRU, LSTM, RNN, SLSTM, chunked, reference, sizes_of

# float32: some roundings of sums over 60 tokens, measured 5e-7. bfloat16: inputs, matrices and what goes through them have 8
# bits, measured 7e-3
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def test_kernels_in_the_interpreter(run_checks_in_the_interpreter):
    run_checks_in_the_interpreter(__file__)


# 34 steps are two chunks. The interpreter takes milliseconds for every step of a kernel, so each thing once
@pytest.mark.parametrize(
    ("heads", "k", "lengths", "dtype"), [(3, 5, (1, 34, 3), torch.float32), (1, 12, None, torch.bfloat16)]
)
@pytest.mark.parametrize("cell", [RNN(), GRU(), LSTM(), LSTM(coupled=True), SLSTM()], ids=repr)
def check_matrices(cell, heads, k, lengths, dtype):
    from plait.ops.shooting.triton.matrices import MATRICES, supports

    torch.manual_seed(0)
    b, t = (2, 34) if lengths is None else (1, sum(lengths))
    packing = None if lengths is None else Packing.of_lengths(lengths, torch.device("cpu"))
    g, s, n = len(cell.inputs), len(cell.states), b if lengths is None else len(lengths)
    recurrent, bias = torch.randn(g, heads, k, k) / (2 * k**0.5), torch.randn(g, heads, k) / 10
    x, h0 = torch.randn(b, t, g, heads, k).to(dtype), torch.randn(n, s, heads, k) / 3
    bound, tol = cell.bind(recurrent, bias=bias), 1e-6 if dtype == torch.float32 else 1e-3
    assert supports(Call("cuda", dtype, "many", sizes=sizes_of(bound, x, "shooting"))) is None
    grad, grad_final = torch.randn(b, t, heads, k), torch.randn(n, s, heads, k)
    h, rest, final, solved = chunked.forward(bound, x, h0, packing, tol, None, MATRICES)
    assert not solved.fell_back
    states = torch.cat([h[:, :, None], rest], 2)
    got = chunked.backward(bound, x, h0, states, grad, grad_final, packing, tol, None, MATRICES)
    leaves = [w.double().requires_grad_() for w in (x, h0, recurrent, bias)]
    exact, last = reference.run(cell.bind(leaves[2], bias=leaves[3]), leaves[0], leaves[1], packing)
    want = torch.autograd.grad((exact[:, :, 0] * grad).sum() + (last * grad_final).sum(), leaves)
    for a, b_ in zip([states, final, *got], [exact, last, *want], strict=True):
        error = (a.double() - b_).abs().max() / b_.abs().max()
        assert error < TOLERANCES[dtype]
