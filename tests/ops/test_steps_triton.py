"""A single token on the rows of a pool: the Triton kernels, in Triton's interpreter, against the definitions in float64.

The interpreter has to be chosen before triton is first imported, so the checks run in a process of their own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops import conv, delta, rms_norm, rotary, ssd, swiglu
from plait.ops.shooting import GRU, LSTM, RNN, SLSTM, pooled, reference
from plait.ops.shooting.cells import Cell

B, POOL = 3, 7
ROWS = {"any order": torch.tensor([5, 0, 3]), "a slice": slice(1, 7, 2)}
WITHIN = {
    torch.float32: 2e-6,
    torch.float16: 1e-3,
}  # of the largest value: sums over 20 numbers, outputs of 24 and 11 bits


def test_kernels_in_the_interpreter(run_checks_in_the_interpreter):
    run_checks_in_the_interpreter(__file__)


def agrees(form: Callable[..., Any], truth: Callable[..., Any], pool: Tensor) -> None:
    """`form(state=, rows=)` works in place, `truth(state)` gives outputs and new states. Nothing else is written."""
    for rows in ROWS.values():
        got, want = pool.clone(), pool.double()
        y, want[rows] = truth(pool[rows].double())
        out, same, *info = form(state=got, rows=rows)
        assert same is got
        assert all(numbers.tolist() == [1, 0, 0] for numbers in info)  # of a cell: one pass, no gap, no fall-back
        for one, other in ((out, y), (got, want)):
            assert (one.double() - other).abs().max() <= WITHIN[one.dtype] * other.abs().max()
        others = torch.ones(POOL, dtype=torch.bool).index_fill(0, torch.arange(POOL)[rows], False)
        assert torch.equal(got[others], pool[others])


def parts(dtype: torch.dtype, heads: int, *sizes: int) -> tuple[Tensor, ...]:
    """(b, 1, heads, size) each, cut out of one projection."""
    torch.manual_seed(0)
    return torch.randn(B, 1, heads, sum(sizes)).to(dtype).split_with_sizes(sizes, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("h", "g", "k", "v"), [(4, 2, 6, 20), (2, 2, 16, 5)])
@torch.no_grad()
def check_linear(h: int, g: int, k: int, v: int, dtype: torch.dtype):
    q, keys = parts(dtype, g, k, k)
    values, gate = parts(dtype, h, v, 1)
    gates = -gate[..., 0].float().exp(), gate[..., 0].float().sigmoid()
    inputs = q, keys / keys.norm(dim=-1, keepdim=True), values, *gates
    for op, given in ((delta, inputs), (ssd, inputs[:4])):
        truth = partial(op.reference.run, *double(*given), packing=None)
        agrees(
            partial(op.pooled.run, *given), lambda state, truth=truth: truth(state=state), torch.randn(POOL, h, v, k)
        )


def double(*values: Any) -> Any:
    """All tensors among them in float64."""
    return [x.double() if isinstance(x, Tensor) else x for x in values]


def delta_layer() -> tuple[Any, ...]:
    (q, k), (v, b, a) = parts(torch.float32, 2, 6, 6), parts(torch.float32, 4, 9, 1, 1)
    return delta, (q, k, v, 30 * a[..., 0], b[..., 0]), delta.Gates(torch.randn(4), torch.randn(4)), (4, 9, 6)


def ssd_layer(*limits: float | None) -> tuple[Any, ...]:
    (q, k), (v, dt) = parts(torch.float32, 2, 6, 6), parts(torch.float32, 4, 9, 1)
    return ssd, (q, k, v, 30 * dt[..., 0]), ssd.Gates(*torch.randn(3, 4), *limits), (4, 9, 6)


def ssd_layer_with_limits() -> tuple[Any, ...]:
    return ssd_layer(0.5, 2.0)


def ssd_layer_from_a_least_step() -> tuple[Any, ...]:
    return ssd_layer(0.5, None)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("make", [delta_layer, ssd_layer, ssd_layer_with_limits, ssd_layer_from_a_least_step])
@torch.no_grad()
def check_a_layers_way(make: Callable[..., Any], rows: Any):
    """With its gates inside, by the op in float64; in a compiled graph, too. Steps of 30 are where a softplus is linear."""
    op, inputs, gates, shape = make()
    run = {delta: delta.gated_delta, ssd: ssd.ssd}[op]
    got = torch.randn(POOL, *shape)
    want, compiled = got.double(), got.clone()
    y, _ = run(*double(*inputs), gates=type(gates)(*double(*gates)), scale=0.5, state=want, rows=rows)
    whole = torch.compile(op.pooled.run, fullgraph=True, backend="aot_eager")
    for form, state in ((op.pooled.run, got), (whole, compiled)):
        out, same = form(*inputs, state=state, rows=rows, scale=0.5, **gates._asdict())
        assert same is state
        for one, other in ((out, y), (state, want)):
            assert (one.double() - other).abs().max() <= WITHIN[one.dtype] * other.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("channels", "width", "bias"), [(300, 4, True), (7, 2, False)])
@torch.no_grad()
def check_conv(channels: int, width: int, bias: bool, dtype: torch.dtype):
    torch.manual_seed(0)
    x = torch.randn(B, 1, channels + 3).to(dtype)[..., :channels]
    inputs = x, torch.randn(channels, width), torch.randn(channels) if bias else None

    def truth(tail: Tensor) -> Any:
        past = torch.cat([tail, x.double()], 1)
        y = conv.reference.run(past, *double(*inputs[1:]), width - 1, None)
        return (F.silu(y) if bias else y), past[:, 1:]

    agrees(partial(conv.pooled.run, *inputs, silu=bias), truth, torch.randn(POOL, width - 1, channels).to(dtype))


CELLS = (RNN(), RNN("relu"), GRU(), LSTM(), LSTM(True, True), SLSTM())


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: type(cell).__name__)
@torch.no_grad()
def check_cells(cell: Cell):
    torch.manual_seed(0)
    g, heads, k = len(cell.inputs), 2, 70
    x = torch.randn(heads, B, 1, g, k).permute(1, 2, 3, 0, 4)
    bound = cell.bind(torch.randn(g, heads, k), weights=tuple(torch.randn(heads, k) for _ in cell.weights))

    def truth(state: Tensor) -> Any:
        states, final = reference.run(bound.with_tensors(double(*bound.tensors())), x.double(), state, None)
        return states[:, :, 0], final

    agrees(partial(pooled.run, bound, x, None), truth, torch.randn(POOL, len(cell.states), heads, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gate_first", [False, True])
def check_norms(gate_first: bool, dtype: torch.dtype):
    """Of all channels, of each head with one weight, of each group with weights of its own; a gate cut out of a projection."""
    torch.manual_seed(0)
    x, gate = (x[..., :3, :].to(dtype) for x in torch.randn(2, B, 2, 4, 40))
    for weights, shape, zero_centered in (
        (40, (B, 2, 3, 40), True),
        (120, (B, 2, 3, 40), False),
        (40, (B, 2, 40), True),
    ):
        rows, gates, weight = x.reshape(B, 2, -1)[..., : shape[-1] * 3].view(B, 2, 3, 40), gate, torch.randn(weights)
        if len(shape) == 3:
            rows, gates = rows[:, :, 0], gates[:, :, 1]
        options = {"eps": 1e-3, "zero_centered": zero_centered}
        factor = weight.double() + zero_centered
        want = rms_norm.gated_rms_norm(rows.double(), gates.double(), factor, 1e-3, gate_first=gate_first)
        got = rms_norm._rows(rows, weight, gates, *options.values(), gate_first)
        assert (got.double() - want).abs().max() <= WITHIN[dtype] * want.abs().max()
        if weights == 40:
            want = rms_norm.rms_norm(rows.double(), weight.double(), **options)
            got = rms_norm._rows(rows, weight, None, *options.values(), False)
            assert (got.double() - want).abs().max() <= WITHIN[dtype] * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def check_what_goes_number_by_number(dtype: torch.dtype):
    torch.manual_seed(0)
    x = torch.randn(B, 2, 3, 50).to(dtype)[..., :40]
    for rotated in (40, 12):
        cos, sin = torch.randn(2, B, 2, 1, 1, rotated // 2).to(dtype)
        sin = torch.cat([-sin, sin], 3)
        want = rotary.rotate(*double(x, cos, sin))
        assert (rotary._rows(x, cos, sin).double() - want).abs().max() <= WITHIN[dtype] * want.abs().max()
    want = swiglu.swiglu(x.double())
    assert (swiglu._rows(x).double() - want).abs().max() <= WITHIN[dtype] * want.abs().max()
    gate, up = x.double().chunk(2, -1)
    share = gate.sigmoid()
    for dy in (torch.randn(want.shape).to(dtype), torch.ones((), dtype=dtype).expand(want.shape)):
        want = torch.cat([dy.double() * up * share * (1 + gate * (1 - share)), dy.double() * gate * share], -1)
        assert (swiglu._gradient(x, dy).double() - want).abs().max() <= WITHIN[dtype] * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("zero_centered", [False, True])
@torch.no_grad()
def check_the_norm_of_a_sum(zero_centered: bool, dtype: torch.dtype):
    torch.manual_seed(0)
    x, y = torch.randn(2, B, 2, 50).to(dtype)[..., :40]
    weight = torch.randn(40)
    total, normed = rms_norm._sums(x, y, weight, 1e-3, zero_centered)
    assert torch.equal(total, x + y)
    want = rms_norm.rms_norm(total.double(), weight.double(), 1e-3, zero_centered)
    assert (normed.double() - want).abs().max() <= WITHIN[dtype] * want.abs().max()
