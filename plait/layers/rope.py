"""Rotary positions, and a temperature by position."""

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from plait.design.layers.rope import NTK, Linear, Llama3, LongRoPE, RoPE, Temperature, YaRN
from plait.layers.context import Context
from plait.ops.kernels import cast
from plait.ops.rotary import rotate


def turn(x: Float[Tensor, "b t h k"], rope: RoPE, context: Context) -> Float[Tensor, "b t h k"]:
    """Rotate channel pairs (i, i + r/2) of the first r channels by position * theta^(-2i/r) (arXiv 2104.09864, eq. 34), or as
    the scaling says."""
    rotated = rope.rotated(x.shape[-1])
    if not rotated:  # of heads so narrow that a fraction of them is less than a pair
        return x
    return rotate(x, *angles(rope, rotated, context, x.dtype))


def turn_both(
    q: Float[Tensor, "b t h k"], k: Float[Tensor, "b t h k"], rope: RoPE | None, context: Context
) -> tuple[Float[Tensor, "b t h k"], Float[Tensor, "b t h k"]]:
    """Queries and keys of as many heads in one go; as they are where there are no positions."""
    if rope is None:
        return q, k
    q, k = turn(torch.cat([q, k], 2), rope, context).chunk(2, 2)
    return q, k


def sharpen(q: Float[Tensor, "b t h k"], temperature: Temperature, context: Context) -> Float[Tensor, "b t h k"]:
    """Queries times 1 + scale ln(1 + floor((p + 1) / every))."""
    scale, every = temperature.scale, temperature.every

    def factor() -> Tensor:
        stage = (context.positions + 1) // every
        return (1 + scale * stage.to(torch.promote_types(q.dtype, torch.float32)).log1p())[..., None, None]

    return q * cast(context.cached(("temperature", scale, every, q.dtype), factor), q.dtype)


def angles(rope: RoPE, rotated: int, context: Context, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos (b, t, 1, 1, r/2), and sin with the sign of either member (b, t, 1, 2, r/2); once for all layers of a call."""
    key = "rope", rope.theta, rope.scaling and rope.scaling.key, rotated, dtype
    return context.cached(key, lambda: _angles(rope, rotated, context.positions, dtype))


def _angles(rope: RoPE, rotated: int, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `angles`.

    Angles are float32 at least: bfloat16 cannot tell position 256 from 257.
    """
    wide = torch.promote_types(dtype, torch.float32)
    kept = type(positions) is Tensor and not torch.compiler.is_compiling()
    turns, factor = (_kept_frequencies if kept else frequencies)(rope, rotated, positions.device, wide)
    turned = positions[..., None, None, None].to(wide) * turns
    cos, sin = turned.cos(), turned.sin()
    if factor != 1:
        cos, sin = cos * factor, sin * factor
    sin = sin.to(dtype)
    return cos.to(dtype), torch.cat([-sin, sin], -2)


def frequencies(
    rope: RoPE, rotated: int, device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, " r/2"], float]:
    """By how much each pair turns from one position to the next, and what queries and keys are multiplied by."""
    pair = torch.arange(0, rotated, 2, device=device, dtype=dtype)
    scaling, theta = rope.scaling, rope.theta
    if isinstance(scaling, NTK) and rotated > 2:
        theta *= scaling.factor ** (rotated / (rotated - 2))
    turns = theta ** -(pair / rotated)
    if isinstance(scaling, Linear):
        return turns / scaling.factor, 1.0
    if isinstance(scaling, Llama3):
        times = turns * (scaling.original / (2 * math.pi))  # round, in as many positions
        kept = ((times - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
        return turns * (kept + (1 - kept) / scaling.factor), 1.0
    if isinstance(scaling, YaRN):
        low, high = (
            _pair_that_turns(times, rope, scaling, rotated) for times in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotated - 1)
        slow = ((pair / 2 - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        factor = scaling.attention_factor
        if factor is None:
            factor = 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
        return turns * (1 - slow + slow / scaling.factor), factor
    if isinstance(scaling, LongRoPE):
        factor = scaling.attention_factor
        if factor is None:
            factor = math.sqrt(1 + math.log(max(scaling.factor, 1.0)) / math.log(scaling.original))
        return turns / torch.tensor(scaling.factors, device=device, dtype=dtype), factor
    return turns, 1.0


@lru_cache
def _kept_frequencies(rope: RoPE, rotated: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Worked out once: half a dozen kernels less in every step, none of which waits for the host."""
    with torch.inference_mode(False):
        return frequencies(rope, rotated, device, dtype)


def _pair_that_turns(times: float, rope: RoPE, scaling: YaRN, rotated: int) -> float:
    """The number of the pair that turns so many times in the original positions."""
    return rotated * math.log(scaling.original / (times * 2 * math.pi)) / (2 * math.log(rope.theta))
