"""The gated DeltaNet layer."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import GatedDeltaNet, told
from plait.design.model import ModelConfig
from plait.layers.context import Context
from plait.layers.mamba2 import reset_conv
from plait.layers.norm import Norm
from plait.ops.conv import causal_conv
from plait.ops.delta import gated_delta
from plait.ops.kernels import cast
from plait.ops.rms_norm import l2norm
from plait.state import Recurrent, recurrent


class GatedDeltaNetLayer(nn.Module):
    """arXiv 2412.06464 as in Qwen3-Next. `in_proj` holds the rows of q, k, v, z, b and a, heads in order."""

    def __init__(self, config: GatedDeltaNet, design: ModelConfig):
        super().__init__()
        key, value = config.widths()
        heads, self.head_dim, self.value_head_dim = map(
            told, (config.value_heads, config.head_dim, config.value_head_dim)
        )
        self.widths = [2 * key + value, value, heads, heads]
        self.conv_widths = [2 * key, value]
        self.in_proj = nn.Linear(design.dim, sum(self.widths), bias=False)
        self.conv1d_weight = nn.Parameter(torch.empty(2 * key + value, config.conv_width))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        # queries are scaled by 1/sqrt(k); here outputs stay that much larger, and the bound inside the norm grows with them
        eps = design.norm.eps * self.head_dim
        self.norm = Norm(self.value_head_dim, design.norm.replace(zero_centered=False, eps=eps))
        self.out_proj = nn.Linear(value, design.dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A ~ U(0.01, 16), dt_bias = 1."""
        nn.init.uniform_(self.A_log, 0.01, 16).data.log_()
        nn.init.ones_(self.dt_bias)
        reset_conv(self.conv1d_weight, None)

    def forward(
        self, x: Float[Tensor, "b t d"], context: Context, state: Recurrent | None
    ) -> tuple[Float[Tensor, "b t d"], Recurrent | None]:
        qkv, z, b, a = self.in_proj(x).split_with_sizes(self.widths, -1)
        qkv, conv = causal_conv(qkv, self.conv1d_weight, state=state and state.conv, packing=context.packing)
        qk, v = F.silu(qkv).split_with_sizes(self.conv_widths, -1)
        q, k = l2norm(qk.unflatten(-1, (2, -1, self.head_dim))).unbind(2)  # (b, t, g, k)
        v = v.unflatten(-1, (-1, self.value_head_dim))  # (b, t, h, v)
        A_log = self.A_log
        g = -A_log.exp() * F.softplus(cast(a, A_log.dtype) + self.dt_bias)
        beta = torch.sigmoid(cast(b, A_log.dtype))
        o, s = gated_delta(q, k, v, g, beta, state=state and state.s, packing=context.packing)
        o = self.norm(o) * F.silu(z.unflatten(-1, (-1, self.value_head_dim)))
        return self.out_proj(o.flatten(2)), recurrent(s, conv)
