"""The layers of RWKV-7."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import RWKV7, RWKV7FeedForward
from plait.design.layers.rwkv7 import SHIFTED
from plait.design.model import ModelConfig
from plait.layers.context import Context
from plait.layers.declared import LayerModule, MixerModule
from plait.layers.norm import HeadNorm
from plait.ops.channels_gpu import REMOVAL
from plait.ops.conv import causal_conv
from plait.ops.gla import dplr
from plait.ops.kernels import Call, cast, wide
from plait.ops.rms_norm import l2norm
from plait.state import Recurrent, Shifted, recurrent

FASTEST = -math.exp(-0.5)  # the log of the smallest decay


class RWKV7Layer(MixerModule):
    """arXiv 2503.14456, equations 3 to 22."""

    config: RWKV7
    r_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    w_down: nn.Linear
    w_up: nn.Linear
    a_down: nn.Linear
    a_up: nn.Linear
    g_down: nn.Linear
    g_up: nn.Linear
    v_down: nn.Linear
    v_up: nn.Linear
    w0: nn.Parameter
    a0: nn.Parameter
    v0: nn.Parameter
    k_k: nn.Parameter
    k_a: nn.Parameter
    r_k: nn.Parameter
    norm: HeadNorm

    @classmethod
    def ops(cls, config: RWKV7, call: Call) -> list[tuple[str, str | None]]:
        return [("conv", None), ("gla", REMOVAL)]

    def assemble(self, design: ModelConfig) -> None:
        c = self.config
        self.norm = HeadNorm(c.heads, c.head_dim, c.norm_eps, bias=True)

    def inner(
        self, x: Float[Tensor, "b t d"], context: Context, state: Recurrent | None
    ) -> tuple[Float[Tensor, "b t d"], Recurrent | None]:
        change, conv = shifted(x, context, state and state.conv)
        r, w, k, v, a, g = (x + change * cast(getattr(self, f"x_{name}"), x.dtype) for name in SHIFTED)
        logs = FASTEST * torch.sigmoid(self.w0 + wide(self.w_up(torch.tanh(self.w_down(w)))))
        r, k, v, low = self.r_proj(r), self.k_proj(k), self.v_proj(v), v
        first = context.cached("rwkv7 v0", lambda: v)
        if self.config.value_residual:
            v = torch.lerp(v, first, torch.sigmoid(self.v0.to(v.dtype) + self.v_up(self.v_down(low))))
        a = torch.sigmoid(self.a0.to(k.dtype) + self.a_up(self.a_down(a)))
        gate = self.g_up(torch.sigmoid(self.g_down(g)))
        removed = k * self.k_k.to(k.dtype)
        k = k * (1 + (a - 1) * self.k_a.to(k.dtype))
        r, k, v, a, logs, removed = (y.unflatten(-1, (self.config.heads, -1)) for y in (r, k, v, a, logs, removed))
        eps = self.config.removal_eps
        removed = F.normalize(wide(removed), dim=-1) if eps is None else l2norm(wide(removed), eps)
        o, s = dplr(
            r, k, v, logs, -removed, removed * a,
            state=state and state.s, rows=context.rows, packing=context.packing,
        )  # fmt: skip
        bonus = (r * k * self.r_k.to(r.dtype).view(r.shape[2:])).sum(-1, keepdim=True) * v
        return (self.norm(o) + bonus).flatten(2) * gate, recurrent(s, conv)


class RWKV7FeedForwardLayer(LayerModule):
    config: RWKV7FeedForward
    x_k: nn.Parameter
    up_proj: nn.Linear
    down_proj: nn.Linear

    @classmethod
    def ops(cls, config: RWKV7FeedForward, call: Call) -> list[tuple[str, None]]:
        return [("conv", None)]

    def forward(
        self, x: Float[Tensor, "b t d"], context: Context, state: Shifted | None
    ) -> tuple[Float[Tensor, "b t d"], Shifted | None]:
        change, conv = shifted(x, context, state and state.conv)
        hidden = torch.relu(self.up_proj(x + change * cast(self.x_k, x.dtype))).square()
        return self.down_proj(hidden), None if conv is None else Shifted(conv)


def shifted(
    x: Float[Tensor, "b t d"], context: Context, tail: Float[Tensor, "n 1 d"] | None
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "n 1 d"] | None]:
    """What has to be added to a token to get the one before it, zeros before the first; and the last token."""
    taps = x.new_ones(x.shape[-1], 2)
    taps[:, 1] = -1
    return causal_conv(x, taps, state=tail, rows=context.rows, packing=context.packing)  # type: ignore[return-value]  # no `at`
