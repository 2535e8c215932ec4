"""Kernels as an H100 would have them: through Triton's front end, which knows types that its interpreter
does not look at."""

import sys

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux only", allow_module_level=True)

import triton.language as tl
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from plait.ops import (
    channels_triton,
    chunks_gpu,
    cross_entropy_triton,
    elementwise_triton,
    kl_triton,
    matvec_triton,
    rms_norm_triton,
)
from plait.ops.attention.paged import triton as paged
from plait.ops.attention.paged.plan import forced_plan
from plait.ops.conv import tokens_triton
from plait.ops.conv import triton as conv
from plait.ops.delta import triton as delta
from plait.ops.launch import kernel
from plait.ops.scan import triton as scan
from plait.ops.selective import triton as selective
from plait.ops.shooting import GRU, LSTM, SLSTM
from plait.ops.shooting.triton import step
from plait.ops.ssd import triton as ssd

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}


def front_end(run, programs: int, *args: Tensor | float | None, **constants) -> None:
    """In the place of `launch`: no more than Triton's first pass."""
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    signature, known = {}, {}
    for name, arg in zip(run.arg_names, args, strict=False):
        kind = POINTERS[arg.dtype] if isinstance(arg, Tensor) else {int: "i32", float: "fp32"}.get(type(arg))
        signature[name] = kind or "constexpr"
        if kind is None:
            known[name] = arg
    known |= constants
    source = ASTSource(run, signature | dict.fromkeys(constants, "constexpr"), known)
    backend, context = make_backend(TARGET), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(options)
    source.make_ir(TARGET, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    compiled.append(run.fn.__name__)


compiled: list[str] = []


@pytest.fixture(autouse=True)
def only_the_front_end(monkeypatch):
    for module in (
        paged, conv, tokens_triton, delta, ssd, step, rms_norm_triton, elementwise_triton, channels_triton,
        cross_entropy_triton, kl_triton, matvec_triton, scan, selective,
    ):  # fmt: skip
        monkeypatch.setattr(module, "launch", front_end)
    compiled.clear()


def narrow(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def numbers(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("table", [None, (64, 4), (16, 16)])
def test_paged_attention(table, splits):
    page, count = table or (256, 1)
    q, pages, lengths = narrow(2, 3, 4, 64), narrow(2 * count, page, 2, 64), numbers(2)
    where = None if table is None else torch.zeros(2, count, dtype=torch.int32)
    sinks = torch.zeros(4) if table else None
    with forced_plan(splits=splits):
        paged.run(q, pages, pages, where, lengths, 0.1, 100 if table else None, 30.0 if table else None, sinks)
    paged.write(pages, pages, q[:, :, :2], q[:, :, 2:], where, lengths)
    assert compiled == ["attend", *["join"] * (splits > 1), "put"]


@pytest.mark.parametrize("rows", [None, numbers(2)], ids=["slice", "rows"])
def test_steps(rows):
    q, v, g, state = narrow(2, 1, 2, 64), narrow(2, 1, 4, 32), torch.zeros(2, 1, 4), torch.zeros(5, 4, 32, 64)
    A_log = torch.zeros(4)
    for layer in ((), (1.0, A_log, A_log)):
        delta.run(q, q, v, g, g, state, rows, v, *layer, *[1e-6] * bool(layer))
        ssd.run(q, q, v, g, state, rows, v, *layer, *[A_log] * bool(layer))
    for bias in (None, torch.zeros(64)):
        conv.run(q[:, :, 0], torch.zeros(64, 4), bias, narrow(5, 3, 64), rows, q[:, :, 0], bias is not None)
    for cell in (GRU(), LSTM(True, True), SLSTM()):
        bound = cell.bind(torch.zeros(len(cell.inputs), 2, 64), weights=tuple(torch.zeros(2, 64) for _ in cell.weights))
        state = torch.zeros(5, len(cell.states), 2, 64)
        step.run(bound, narrow(2, 1, len(cell.inputs), 2, 64), state, rows, q, torch.zeros(3))
    assert len(compiled) == 9


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("rule", ["gla", "kda"])
def test_decays_per_channel(rule, packed):
    q, v, g, beta = narrow(1, 70, 2, 96), narrow(1, 70, 2, 80), torch.zeros(1, 70, 2, 96), torch.zeros(1, 70, 2)
    cuts = torch.tensor([0, 5, 70]) if packed else None
    g.requires_grad_()
    state = torch.zeros(1 + packed, 2, 80, 96)
    o, last = chunks_gpu._chunked(q, q, v, g, beta if rule == "kda" else None, state, cuts, 1.0, True)
    (o.sum() + last.sum()).backward()
    assert compiled == ["prepare", "forward", "prepare", "backward", "gradients"]


def test_what_goes_row_by_row():
    x = narrow(2, 3, 64)
    for gate in (None, x):
        for weights in (64, 192):
            rms_norm_triton.run(x, torch.zeros(weights), gate, x, 1e-6, gate is None, weights == 64)
    elementwise_triton.swiglu(x[0], narrow(3, 32))
    elementwise_triton.swiglu_gradient(x[0], narrow(3, 32), x[0])
    for half in (32, 16):
        elementwise_triton.rotate(x[None], narrow(1, 2, 1, 1, half), narrow(1, 2, 1, 2, half), x[None])
    assert len(compiled) == 8


def test_what_the_interpreter_lets_pass_is_seen():
    """A name that is a number to Triton and a tensor within a branch."""

    @kernel
    def wrong(x, N: tl.constexpr):
        for i in tl.static_range(N):
            tl.store(x + i, 0.0)
        if tl.program_id(0) == 0:
            i = tl.arange(0, 4)
            tl.store(x + i, 1.0)

    with pytest.raises(Exception, match="redefines it"):
        front_end(wrong, 1, torch.zeros(4), N=2)


@pytest.mark.parametrize("gradient", [True, False])
def test_losses(gradient):
    y = narrow(3, 5000)
    cross_entropy_triton.run(y, numbers(3), torch.zeros(3), y.clone() if gradient else None)
    kl_triton.run(y, y, torch.zeros(3) if gradient else None, 2.0, torch.zeros(3), y.clone() if gradient else None)
    assert compiled == ["softmax_loss", "divergence"]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("width", "bias", "packed"), [(4, True, True), (1, False, False), (2, False, True)])
def test_convolution_over_many_tokens(width, bias, packed, silu):
    x, weight = narrow(2, 40, 70), narrow(70, width)
    shift, offsets = narrow(70) if bias else None, numbers(80) if packed else None
    tokens_triton.run_forth(x, weight, shift, offsets, x.clone(), silu)
    tokens_triton.run_back(x, weight, shift, offsets, x.clone(), x.clone(), silu)
    assert compiled == ["forth", "back"]


@pytest.mark.parametrize("width", [1024, 5])
def test_the_elementwise_recurrence(width):
    x = torch.zeros(2, 80, width)
    scan.backward(x, x, scan.forward(x, x, x[:, 0]), x[:, 0])
    assert compiled == ["forth", "back"]


@pytest.mark.parametrize("offsets", [None, numbers(80)], ids=["rows", "packed"])
@pytest.mark.parametrize(("width", "states"), [(1024, 16), (5, 64)])
def test_the_selective_scan(width, states, offsets):
    x, B, A = torch.zeros(1, 80, width), torch.zeros(1, 80, states), torch.zeros(width, states)
    h = A[None] if offsets is None else None
    y, last, before = selective.forward(x, x, B, B, A, h, offsets)
    selective.backward(y, None if h is None else last, x, x, B, B, A, offsets, before)
    assert compiled == ["forth", "back"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "k"), [(32_000, 1024), (1024, 2816), (5, 3)])
def test_one_row_and_a_matrix(n, k, bias):
    weight = narrow(1).expand(n, k)
    matvec_triton.run(narrow(k), weight, narrow(n) if bias else None, narrow(n))
    assert compiled == ["product"]
