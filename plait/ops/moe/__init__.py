"""Mixture of experts without dropped tokens (MegaBlocks, arXiv 2211.15841): y = sum over a token's experts e of
w_e down_e(silu(gate_e x) * up_e x), or down_e(relu(up_e x)^2) without gates."""

from math import gcd

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.ops.kernels import Call, Kernel, Kernels, always, cast, choose, full_precision, needs_nvidia
from plait.ops.moe import few, grouped, loop, reference
from plait.ops.moe.routing import route as route

ALIGNED = 8  # bfloat16 numbers in 16 bytes, which torch's kernel for groups reads at once
HOPPER = (9, 0)  # the first architecture that it exists for; on others torch asks the device how large the groups are


def aligned(*sizes: int) -> int:
    """What all these sizes are multiples of, as far as forms ask."""
    return gcd(ALIGNED, *sizes)


def _torch_groups(call: Call) -> str | None:
    if reason := needs_nvidia(call, HOPPER):
        return reason
    if call.dtype != torch.bfloat16:
        return f"only for bfloat16, not {call.dtype}"
    if call.sizes not in (None, ALIGNED):
        return f"sizes are multiples of {call.sizes}, not of {ALIGNED}"
    return None


def _may_ask(call: Call) -> str | None:
    if call.device == "cpu" or call.gradients or call.tokens == "many":
        return None
    return "would wait for the device at every step"


def _decoding(call: Call) -> str | None:
    return "only for few tokens" if call.tokens == "many" else None


KERNELS = Kernels(
    "moe",
    (
        Kernel("grouped", grouped.run, _torch_groups),
        Kernel("loop", loop.run, _may_ask),
        Kernel("few", few.run, _decoding),
        Kernel("reference", reference.run, always),
    ),
)


def experts(
    x: Float[Tensor, "b t d"],
    up: Float[Tensor, "e w d"],
    down: Float[Tensor, "e o h"],
    index: Int[Tensor, "b t k"],
    weights: Float[Tensor, "b t k"],
    gated: bool = True,
) -> Float[Tensor, "b t o"]:
    """What the experts `index` make of each token, times `weights`, summed. `up` holds the rows of gate, then of up, or
    without gates those of up alone.

    Products are in the dtype that autocast says, else in that of x. A token's result is its own: whatever else its experts
    read, its terms are summed in the order of its choices.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, up, down = (cast(y, dtype) for y in (x, up, down))
    kernel = choose(KERNELS, x, sizes=aligned(x.shape[-1], *down.shape[1:]))
    with full_precision(x.device):
        y = kernel.run(x.flatten(0, 1), up, down, index.flatten(0, 1), cast(weights, x.dtype).flatten(0, 1), gated)
    return y.unflatten(0, x.shape[:2])
