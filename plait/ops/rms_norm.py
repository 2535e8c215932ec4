"""RMSNorm (arXiv 1910.07467): y = x / sqrt(mean(x^2) + eps) * w over the last axis; and x / |x|.

torch has a fused kernel for devices but composes it from many passes on the CPU; here a norm takes the fewest passes
that torch's ops allow, and has its own gradient. The few rows of a decoding step on a GPU are one kernel, gate and all.
"""

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from plait.ops.graph import gradient, one_step
from plait.ops.kernels import WIDE
from plait.ops.operator import operator
from plait.ops.token import few_rows


def rms_norm(
    x: Float[Tensor, "*n d"], weight: Float[Tensor, " d"], eps: float, zero_centered: bool = False
) -> Float[Tensor, "*n d"]:
    """The sum of squares is taken in float32 at least; the result has x's dtype. `zero_centered`: times 1 + w."""
    if not _in_few_passes(x):
        if few_rows(x):
            return _rows(x, weight, None, eps, zero_centered, False)
        if zero_centered and x.dtype not in WIDE:  # 1 + w in 16 bits has lost most of w, for every token alike
            return rms_norm(x.float(), weight.float(), eps, zero_centered).to(x.dtype)
        weight = 1 + weight if zero_centered else weight
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    if torch.is_grad_enabled():
        return _rms_norm(x, 1 + weight if zero_centered else weight, eps)
    norm = torch.linalg.vector_norm(
        x, dim=-1, keepdim=True
    )  # as in `_scale`, without a call for every norm of every token
    y = x * torch.addcmul(_constant(eps, x.dtype), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return y.addcmul_(y, weight) if zero_centered else y.mul_(weight)


def gated_rms_norm(
    x: Float[Tensor, "*n i d"],
    gate: Float[Tensor, "*n i d"],
    weight: Float[Tensor, " w"],
    eps: float,
    *,
    gate_first: bool = False,
) -> Float[Tensor, "*n i d"]:
    """rms_norm(x) silu(gate); `gate_first`: rms_norm(x silu(gate)). The weight is one for all i (d), or for each its own
    (i d), as where groups of channels are normed alone."""
    if x.is_cuda and few_rows(x, gate):
        return _rows(x, weight, gate, eps, False, gate_first)
    if gate_first:
        x = x * F.silu(gate)
    if weight.shape[0] == x.shape[-1]:
        y = rms_norm(x, weight, eps)
    else:
        y = F.rms_norm(x, x.shape[-1:], eps=eps) * weight.to(x.dtype).view(x.shape[-2:])
    return y if gate_first else y * F.silu(gate)


def added_rms_norm(
    x: Float[Tensor, "*n d"],
    y: Float[Tensor, "*n d"],
    weight: Float[Tensor, " d"],
    eps: float,
    zero_centered: bool = False,
) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n d"]]:
    """x + y, and the norm of that."""
    if x.dtype == y.dtype and few_rows(x, y):
        total, normed = _sums(x, y, weight, eps, zero_centered)
        return total, normed
    total = x + y
    return total, rms_norm(total, weight, eps, zero_centered)


def l2norm(x: Float[Tensor, "*n k"], eps: float = 1e-6) -> Float[Tensor, "*n k"]:
    """x / |x|, the norm bounded away from 0."""
    if not _in_few_passes(x):
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
    return _L2Norm.apply(x, eps) if torch.is_grad_enabled() else x * _scale(x, eps, 1.0)


@operator("rms_norm", cheap=True)
def _rows(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, zero_centered: bool, gate_first: bool) -> Tensor:
    from plait.ops import rms_norm_triton

    inner, d = x.shape[-2] if x.ndim > 1 else 1, x.shape[-1]
    out, rows = x.new_empty(x.shape), x.reshape(-1, inner, d)
    gates = None if gate is None else gate.reshape(-1, inner, d)
    rms_norm_triton.run(rows, weight, gates, out.view(rows.shape), eps, zero_centered, gate_first)
    return out


@torch.library.register_fake("plait::rms_norm")
def _(x, weight, gate, eps, zero_centered, gate_first):
    return x.new_empty(x.shape)


@operator("added_rms_norm")
def _sums(x: Tensor, y: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> tuple[Tensor, Tensor]:
    from plait.ops import rms_norm_triton

    d = x.shape[-1]
    total, normed = x.new_empty(x.shape), x.new_empty(x.shape)
    ours, theirs = x.reshape(-1, d), y.reshape(-1, d)
    rms_norm_triton.run_sum(ours, theirs, weight, total.view(-1, d), normed.view(-1, d), eps, zero_centered)
    return total, normed


@torch.library.register_fake("plait::added_rms_norm")
def _(x, y, weight, eps, zero_centered):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _in_few_passes(x: Tensor) -> bool:
    """On a CPU, of an ordinary tensor: one of torch's modes must not get hold of `_constant`."""
    return x.is_cpu and x.dtype in WIDE and type(x) is Tensor and not torch.compiler.is_compiling()


def _scale(x: Float[Tensor, "*n d"], eps: float, part: float) -> Float[Tensor, "*n 1"]:
    """1 / sqrt(part * sum(x^2) + eps)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_constant(eps, x.dtype), norm, norm, value=part).rsqrt_()


@cache
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number that torch takes in half the time of a Python one."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps, 1 / x.shape[-1])  # (*n, 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @gradient
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        product = dy * normed
        dweight = product.flatten(0, -2).sum(0)
        along = product.flatten(0, -2).mv(weight).view(scale.shape) / x.shape[-1]
        dx = torch.mul(dy, weight, out=product).addcmul_(normed, along, value=-1).mul_(scale)
        return dx, dweight, None


class _L2Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps, 1.0)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @gradient
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(dy, y)[..., None]
        return torch.addcmul(dy, y, along, value=-1).mul_(scale), None


_rms_norm = one_step(_RMSNorm)
