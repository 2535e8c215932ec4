"""mLSTM by the Triton kernels of the scalar-decay recurrence, in Triton's interpreter, against its chunked form in float64."""

import pytest
import torch

from plait.ops.kernels import Call
from plait.ops.mlstm import chunked, chunks
from plait.ops.packing import Packing
from tests.ops.test_chunks_triton import ROWS, with_gradients

WITHIN = 2e-3  # of the norm: products of numbers of 11 bits; 1.2e-3 at most is seen
HEADS, K, V = 2, 16, 20


def test_kernels_in_the_interpreter(run_checks_in_the_interpreter):
    run_checks_in_the_interpreter(__file__)


def inputs(b, t, gate, draw):
    torch.manual_seed(0)
    q, k = draw(b, t, HEADS, 2 * K).chunk(2, 3)
    i, f = gate + torch.randn(b, t, HEADS), 2 + torch.randn(b, t, HEADS)
    return [q.half(), k.half(), torch.randn(b, t, HEADS, V).half(), i, f]


@pytest.mark.parametrize("draw", [torch.rand, torch.randn], ids=["", "n q cancels"])
@pytest.mark.parametrize("gate", [1.0, -3.0], ids=["n q above its bound", "below"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def check_outputs_and_gradients(rows, with_state, gate, draw):
    b, lengths = rows
    packing = Packing.of_lengths(lengths, torch.device("cpu")) if len(lengths) > 1 else None
    given = inputs(b, sum(lengths), gate, draw)
    if with_state:
        given.append(draw(b if packing is None else len(lengths), HEADS, V + 2, K))

    def ours(*x):
        return chunks.run(*x[:5], state=x[5] if with_state else None, packing=packing, scale=0.5)

    def truth(q, *x):
        return chunked.run(q * 0.5, *x[:4], state=x[4] if with_state else None, packing=packing)

    for one, other in zip(with_gradients(ours, given), with_gradients(truth, [x.double() for x in given]), strict=True):
        assert one.isfinite().all()
        assert (one.double() - other).norm() <= WITHIN * other.norm()


def test_where_it_runs():
    call = Call("cuda", torch.bfloat16, "many", architecture=(9, 0))
    assert chunks.fits(call) is None
    assert "too narrow" in str(chunks.fits(call._replace(dtype=torch.float16)))
    assert "16 bits" in str(chunks.fits(call._replace(dtype=torch.float32)))
