"""Rotary positions."""

import torch
from jaxtyping import Float
from torch import Tensor

from plait.design.layers import RoPE
from plait.layers.context import Context
from plait.ops.rotary import rotate


def turn(x: Float[Tensor, "b t h k"], rope: RoPE, context: Context) -> Float[Tensor, "b t h k"]:
    """Rotate channel pairs (i, i + r/2) of the first r channels by position * theta^(-2i/r) (arXiv 2104.09864, eq. 34)."""
    rotated = rope.rotated(x.shape[-1])
    cos, sin = context.cached(("rope", rope.theta, rotated, x.dtype), lambda: _angles(rope, rotated, context, x.dtype))
    return rotate(x, cos, sin)


def _angles(rope: RoPE, rotated: int, context: Context, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos (b, t, 1, 1, r/2), and sin with the sign of either member (b, t, 1, 2, r/2).

    Angles are float32 at least: bfloat16 cannot tell position 256 from 257.
    """
    wide = torch.promote_types(dtype, torch.float32)
    ramp = torch.arange(0, rotated, 2, device=context.positions.device, dtype=wide) / rotated
    angles = context.positions[..., None, None, None].to(wide) * rope.theta**-ramp
    sin = angles.sin().to(dtype)
    return angles.cos().to(dtype), torch.cat([-sin, sin], -2)
