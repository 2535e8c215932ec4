"""Recurrences with a decay per key channel in chunks on a GPU: the Triton kernels, in Triton's interpreter, against the loop
over tokens in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.ops import channels_gpu, channels_triton
from plait.ops.delta import gated_delta
from plait.ops.gla import gla
from plait.ops.kernels import forced
from plait.ops.packing import Packing

WITHIN = {torch.float32: 2e-5, torch.float16: 2e-3}  # of the norm; numbers of 24 and of 11 bits
SIZES = {"two blocks of keys": (2, 2, 24, 16), "more heads than keys": (1, 3, 16, 20)}
ROWS = {"rows": (1, (70,)), "packed": (1, (1, 66))}


def test_kernels_in_the_interpreter(run_checks_in_the_interpreter):
    run_checks_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def blocks_of_16_channels(monkeypatch):
    for name in ("prepare", "gradients"):
        monkeypatch.setitem(channels_triton.OPTIONS, name, channels_triton.OPTIONS[name] | {"BK": 16})


def inputs(b: int, t: int, sizes: tuple[int, int, int, int], rule: str, dtype: torch.dtype) -> list[Tensor]:
    """Gates from gentle ones to those of a chunk that sum to -600."""
    torch.manual_seed(0)
    groups, heads, K, V = sizes
    q, k = torch.randn(b, t, groups, 2 * K).chunk(2, 3)  # as a layer cuts them out of one projection
    k, v = k / k.norm(dim=-1, keepdim=True), torch.randn(b, t, heads, V)
    g, beta = -20 * torch.rand(b, t, heads, K) ** 6, 2 * torch.rand(b, t, heads)
    return [*(x.to(dtype) for x in (q, k, v)), g, *([beta] if rule == "kda" else [])]


def with_gradients(run: Callable[..., Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of a fixed sum over them."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    outputs = [x for x in run(*leaves) if x is not None]
    generator = torch.Generator().manual_seed(3)
    loss = torch.stack([(x.double() * torch.randn(x.shape, generator=generator)).sum() for x in outputs]).sum()
    return [*(x.detach() for x in outputs), *torch.autograd.grad(loss, leaves)]


def truth(*x: Tensor, rule: str, **call: Any) -> tuple[Tensor, Tensor | None]:
    with forced("reference"):
        return (gated_delta if rule == "kda" else gla)(*x, **call)[:2]


def close(one: Tensor, other: Tensor, within: float) -> None:
    assert one.isfinite().all()
    assert (one.double() - other).norm() <= within * other.norm()


@pytest.mark.parametrize(("rule", "sizes", "rows", "with_state", "dtype"), [
    ("gla", "two blocks of keys", "rows", True, torch.float32),
    ("gla", "two blocks of keys", "packed", False, torch.float16),
    ("kda", "two blocks of keys", "packed", True, torch.float32),
    ("kda", "more heads than keys", "rows", False, torch.float16),
])  # fmt: skip
def check_outputs_and_gradients(rule: str, sizes: str, rows: str, with_state: bool, dtype: torch.dtype):
    (b, lengths), (groups, heads, K, V) = ROWS[rows], SIZES[sizes]
    packing = Packing.of_lengths(lengths, torch.device("cpu")) if len(lengths) > 1 else None
    given = inputs(b, sum(lengths), (groups, heads, K, V), rule, dtype)
    if with_state:
        given.append(torch.randn(b if packing is None else len(lengths), heads, V, K))

    def called(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*x: Tensor):
            state = x[-1] if with_state else None
            return run(*x[: len(x) - with_state], state=state, packing=packing, scale=0.5)

        return call

    ours = with_gradients(called(channels_gpu.run), given)
    theirs = with_gradients(called(lambda *x, **y: truth(*x, rule=rule, **y)), [x.double() for x in given])
    for one, other in zip(ours, theirs, strict=True):
        close(one, other, WITHIN[dtype])


@pytest.mark.parametrize("gate", [0.0, -1e-3, -5.0, -1e4])
def check_extreme_gates(gate: float):
    """Keys that are all alike, strengths of one, and a gentle decay after every third strong one, whose gradient is to be what
    reaches log A."""
    q, k, v, g, beta = inputs(1, 65, (1, 1, 16, 16), "kda", torch.float32)
    k, g, beta = k[:, :1].expand_as(k), torch.full_like(g, gate), torch.ones_like(beta)
    g[:, 1::3, :, ::2] = -1e-3
    got = with_gradients(lambda *x: channels_gpu.run(*x, state=None, packing=None), [q, k, v, g, beta])
    want = with_gradients(lambda *x: truth(*x, rule="kda"), [x.double() for x in (q, k, v, g, beta)])
    for one, other in zip(got[:4], want[:4], strict=True):
        close(one, other, 1e-4)
    share, true = got[4] * g, want[4] * g
    assert (share.double() - true).abs().max() <= 1e-4 * true.abs().max()
