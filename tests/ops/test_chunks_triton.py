"""Recurrences in chunks on a GPU: the Triton kernels, in Triton's interpreter, against the chunked forms in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.ops import chunks_gpu, delta, ssd
from plait.ops.packing import Packing

WITHIN = 1e-3  # of the norm: products of numbers of 11 bits
SIZES = {"more heads than keys": (1, 3, 16, 20), "as many": (2, 2, 24, 16)}
ROWS = {"rows": (2, (70,)), "packed": (1, (1, 66, 2, 5))}


def test_kernels_in_the_interpreter(run_checks_in_the_interpreter):
    run_checks_in_the_interpreter(__file__)


def inputs(b: int, t: int, sizes: tuple[int, int, int, int], rule: str, most: float = 1.0) -> list[Tensor]:
    torch.manual_seed(0)
    groups, heads, K, V = sizes
    q, k = torch.randn(b, t, groups, 2 * K).chunk(2, 3)  # as a layer cuts them out of one projection
    k, v = k / k.norm(dim=-1, keepdim=True), torch.randn(b, t, heads, V)
    g, beta = -torch.rand(b, t, heads), most * torch.rand(b, t, heads)
    return [*(x.half() for x in (q, k, v)), g, *([beta] if rule == "delta" else [])]


def with_gradients(run: Callable[..., Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of a fixed sum over them."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    outputs = [x for x in run(*leaves) if x is not None]
    generator = torch.Generator().manual_seed(3)
    loss = sum((x.double() * torch.randn(x.shape, generator=generator)).sum() for x in outputs)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("rule", ["ssd", "delta"])
def check_outputs_and_gradients(rule: str, rows: tuple[int, tuple[int, ...]], sizes: tuple[int, ...], with_state: bool):
    b, lengths = rows
    packing = Packing.of_lengths(lengths, torch.device("cpu")) if len(lengths) > 1 else None
    given = inputs(b, sum(lengths), sizes, rule)
    if with_state:
        given.append(torch.randn(b if packing is None else len(lengths), sizes[1], sizes[3], sizes[2]))
    chunked = {"ssd": ssd, "delta": delta}[rule].chunked.run

    def ours(*x: Tensor):
        state = x[-1] if with_state else None
        return chunks_gpu.run(*x[: 4 + (rule == "delta")], state=state, packing=packing, scale=0.5)

    def truth(q: Tensor, *x: Tensor):
        state = x[-1] if with_state else None
        return chunked(q * 0.5, *x[: 3 + (rule == "delta")], state=state, packing=packing)

    for one, other in zip(with_gradients(ours, given), with_gradients(truth, [x.double() for x in given]), strict=True):
        assert one.isfinite().all()
        assert (one.double() - other).norm() <= WITHIN * other.norm()


@pytest.mark.parametrize("gate", [0.0, -1e-3, -1e4])
@torch.no_grad()
def check_extreme_gates(gate: float):
    """Keys that are all alike, strengths of one: the inverse that amplifies most of those with decays up to 1."""
    q, k, v, g, beta = inputs(1, 65, (1, 1, 16, 16), "delta")
    k, g, beta = k[:, :1].expand_as(k), torch.full_like(g, gate), torch.ones_like(beta)
    o, _ = chunks_gpu.run(q, k, v, g, beta, state=None, packing=None)
    truth, _ = delta.chunked.run(*(x.double() for x in (q, k, v, g, beta)), state=None, packing=None)
    assert (o.double() - truth).norm() <= 10 * WITHIN * truth.norm()
