"""Compiled kernels are launched again only where Triton would have chosen them."""

import sys
from itertools import combinations

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux only", allow_module_level=True)

from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction

from plait.ops import launch as room
from plait.ops.shooting import GRU, LSTM
from plait.ops.shooting import triton as triton_room
from plait.ops.shooting.triton.matrices import MATRICES

NUMBERS = torch.zeros(64, dtype=torch.bfloat16)
ARGUMENTS = (
    *(NUMBERS, NUMBERS[1:], NUMBERS[8:], NUMBERS.float(), NUMBERS.float()[4:], NUMBERS.float()[1:]),
    *(None, True, False, 0.0, 0.5, 1.0),
    *(0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, 2**40, 2**63),
)


@pytest.mark.parametrize("free", [False, True])
def test_what_triton_tells_apart_is_told_apart(free):
    backend = make_backend(GPUTarget("cuda", 90, 32))
    told = [(native_specialize_impl(backend, arg, False, not free, True), room._kind(arg, free)) for arg in ARGUMENTS]
    for (theirs, ours), (their_other, our_other) in combinations(told, 2):
        assert theirs == their_other or ours != our_other


class Compiling(JITFunction):
    """A kernel that keeps a record: what it compiles, and what the compiled form launches."""

    def __init__(self, fn):
        super().__init__(fn)
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def compile_and_run(*args, **constants):
            self.compiled.append((grid, args, constants))
            return Form(self.launched)

        return compile_and_run


class Form:
    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *args: self.launched.append((grid, args))


def kernel(x, n, A, B):
    pass


def test_a_form_is_compiled_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    k = Compiling(kernel)
    for programs, n in ((4, 2), (5, 3)):
        room.launch(k, programs, NUMBERS, n, B="b", num_warps=1, A="a")
    assert k.compiled == [((4,), (NUMBERS, 2), {"A": "a", "B": "b", "num_warps": 1})]
    assert k.launched == [((5, 1, 1), (NUMBERS, 3, "a", "b"))]  # constants in the order of the signature
    room.launch(k, 4, NUMBERS, 1, B="b", num_warps=1, A="a")  # a 1 is compiled in
    room.launch(k, 4, NUMBERS, 2, B="b", num_warps=2, A="a")
    room.launch(k, 4, NUMBERS, 2, B="c", num_warps=1, A="a")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    room.launch(k, 4, NUMBERS, 2, B="b", num_warps=1, A="a")
    assert len(k.compiled) == 5 and len(k.launched) == 1


@pytest.fixture
def compiling(monkeypatch):
    """Launches on an imagined GPU; the list of the forms that were compiled for it."""
    forms, compiled = [], {}
    monkeypatch.setattr(room, "_compiled", compiled)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton_room, "_multiprocessors", lambda device: 132)

    def compile_and_run(kernel, grid):
        return lambda *args, **constants: forms.append(kernel.fn.__name__) or Form([])

    monkeypatch.setattr(JITFunction, "__getitem__", compile_and_run)
    return forms


# around every multiple that a number could be told apart by; the longest are cut into a grid of chunks
SEEN, NEW = (
    (2, 16, 200, 1024, 3000),
    (3, 17, 31, 48, 63, 64, 65, 100, 255, 257, 500, 1000, 1001, 2047, 2048, 4096, 16001),
)


def prefill(cell, length, batch, headwise, train):
    g, s = len(cell.inputs), len(cell.states)
    x = torch.zeros(2, batch, length, g, 24).permute(1, 2, 3, 0, 4)
    x, h0 = x if headwise else x.contiguous(), torch.zeros(batch, s, 2, 24)
    bound = cell.bind(torch.zeros(g, 2, 24), weights=tuple(torch.zeros(2, 24) for _ in cell.weights))
    h, rest, final, _ = triton_room.forward(bound, x, h0, None, 1e-6, 3)
    if train:
        triton_room.backward(bound, x, h0, h, rest, torch.zeros_like(h), torch.zeros_like(final), None)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("headwise", [False, True])
@pytest.mark.parametrize("cell", [GRU(), LSTM(coupled=True, peephole=True)], ids=["GRU", "LSTM"])
def test_new_lengths_compile_nothing_new(compiling, cell, headwise, train):
    for length in SEEN:
        prefill(cell, length, 1, headwise, train)
    known = list(compiling)
    assert set(known) >= {"advance", "close"} and len(known) <= (10 if train else 7)
    for number, length in enumerate(NEW):
        prefill(cell, length, 1 + number % 3, headwise, train)
    assert compiling == known


def test_new_lengths_compile_nothing_new_with_matrices(compiling):
    cell = GRU().bind(torch.zeros(3, 2, 16, 16))

    def run(length, batch):
        x, s = torch.zeros(40, -(-length // 40) * batch, 3, 2, 16), torch.zeros(-(-length // 40) * batch, 1, 2, 16)
        states = MATRICES.run(cell, x, s)
        MATRICES.back(cell, x, torch.cat([s[None], states[:-1]])).run(torch.zeros_like(states), s, len(x))

    for length in SEEN:
        run(length, 1)
    known = list(compiling)
    assert set(known) == {"_advance", "_retreat"} and len(known) <= 4
    for number, length in enumerate(NEW):
        run(length, 1 + number % 3)
    assert compiling == known
