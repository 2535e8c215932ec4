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

from plait.ops.shooting.triton import launch as room

NUMBERS = torch.zeros(64, dtype=torch.bfloat16)
ARGUMENTS = (
    *(NUMBERS, NUMBERS[1:], NUMBERS[8:], NUMBERS.float(), NUMBERS.float()[4:], NUMBERS.float()[1:]),
    *(None, True, False, 0.0, 0.5, 1.0),
    *(0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, 2**40, 2**63),
)


def test_what_triton_tells_apart_is_told_apart():
    backend = make_backend(GPUTarget("cuda", 90, 32))
    told = [(native_specialize_impl(backend, arg, False, True, True), room._kind(arg)) for arg in ARGUMENTS]
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
