"""The stabiliser of exponential gates, for all tokens at once.

m_t = max(log f_t + m_{t-1}, i~_t) is a sum and a running maximum: with F_t the sum of log f up to t, m_t = F_t + the largest
i~_j - F_j so far. Relative to it the gates are exp of what is at most 0, so that the recurrence is the scalar-decay one
(`plait.ops.ssd`) with log decays log f_t + m_{t-1} - m_t and inputs times exp(i~_t - m_t).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from plait.ops.graph import gradient
from plait.ops.operator import operator
from plait.ops.packing import Packing

EPS = 1e-6  # added to what is divided by, as in xLSTM's kernels
LARGEST = {
    torch.float32: 80.0,
    torch.float64: 700.0,
}  # whose exponential is finite; what is divided by it is 0 beside 1


class Gates(NamedTuple):
    """The stabiliser, in float64; log decays and the factors of inputs, in the gates' dtype."""

    m: Float[Tensor, "b t h"]
    g: Float[Tensor, "b t h"]
    scale: Float[Tensor, "b t h"]


def stabilised(
    i: Float[Tensor, "b t h"], f: Float[Tensor, "b t h"], before: Float[Tensor, "n h"] | None, packing: Packing | None
) -> Gates:
    """`before`: m before the first token of each row, or document; None: 0. Sums run in float64: they reach thousands."""
    dtype, i, logf = i.dtype, i.double(), F.logsigmoid(f.double())
    m0 = i.new_zeros(1, 1, i.shape[2])
    if before is not None:
        m0 = before.double()[:, None] if packing is None else before.double()[packing.documents][None]
    if packing is None:
        first = (torch.arange(i.shape[1], device=i.device) == 0)[None, :, None]
    else:
        first = (packing.offsets == 0)[..., None]
    source = torch.where(first, torch.maximum(i, logf + m0), i)
    # a decay after which nothing from before a document is the largest; that of the first token counts for nothing
    beyond = -(i.detach().abs().amax() + m0.detach().abs().amax()) * 2 - 1
    m = _Running.apply(torch.where(first, beyond, logf), source)
    previous = torch.where(first, m0, F.pad(m[:, :-1], (0, 0, 1, 0)))
    return Gates(m, (logf + previous - m).to(dtype), (i - m).exp().to(dtype))


class _Running(torch.autograd.Function):
    """m (b, t, h) of decays and sources (b, t, h): m_t = max(decay_t + m_{t-1}, source_t), from source_0 on."""

    @staticmethod
    def forward(ctx, decay, source):
        m, at = _running(decay, source)
        ctx.save_for_backward(at)
        return m

    @staticmethod
    @gradient
    def backward(ctx, dm):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _running_backward(dm, *ctx.saved_tensors)


# Operators: where rows are few, torch 2.11's compiler splits a sum over time among a GPU's processors, and fails if what it
# sums reads anything without a time, such as a bias per head. Running maxima it leaves to torch anyway.


@operator("mlstm_gates")
def _running(decay: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """m, and the token whose source each is."""
    if decay.is_cuda:  # torch's kernels give a row many threads where time lies last, elsewhere one
        m, at = _along(decay.mT, source.mT, 2)
        return m.mT.contiguous(), at.mT.contiguous()
    return _along(decay, source, 1)


def _along(decay: Tensor, source: Tensor, time: int) -> tuple[Tensor, Tensor]:
    total = decay.cumsum(time)
    most, at = (source - total).cummax(time)
    return most.add_(total), at


@torch.library.register_fake("plait::mlstm_gates")
def _(decay, source):
    return source.new_empty(source.shape), source.new_empty(source.shape, dtype=torch.int64)


@operator("mlstm_gates_backward")
def _running_backward(dm: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients at decays and sources: a token's is that of all m until another source takes over."""
    dsource = torch.zeros_like(at, dtype=dm.dtype).scatter_add_(1, at, dm)
    passed = dm - dsource
    if dm.is_cuda:
        return passed.mT.flip(2).cumsum(2).flip(2).mT.contiguous(), dsource
    return passed.flip(1).cumsum(1).flip(1), dsource


@torch.library.register_fake("plait::mlstm_gates_backward")
def _(dm, at):
    return dm.new_empty(dm.shape), dm.new_empty(dm.shape)


def divided(
    Cq: Float[Tensor, "b t h v"], nq: Float[Tensor, "b t h"], m: Float[Tensor, "b t h"]
) -> Float[Tensor, "b t h v"]:
    """C q over max(|n q|, exp(-m)), of which the last is the bound 1 of what is not stabilised."""
    bound = (-m).clamp(max=LARGEST[nq.dtype]).exp().to(nq.dtype)
    return Cq / (torch.maximum(nq.abs(), bound) + EPS)[..., None]


def last_of(m: Float[Tensor, "b t h"], packing: Packing | None) -> Float[Tensor, "n h"]:
    """After the last token of each row, or document."""
    return m[:, -1] if packing is None else m[0, packing.cuts[1:].long() - 1]


def with_m(S: Float[Tensor, "*n h v+1 k"], m: Float[Tensor, "*n h"]) -> Float[Tensor, "*n h v+2 k"]:
    """The state: C and n, then m."""
    return torch.cat([S, m.to(S.dtype)[..., None, None].expand(*m.shape, 1, S.shape[-1])], -2)
