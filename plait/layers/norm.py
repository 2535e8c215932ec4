"""RMSNorm, gated or not, and LayerNorm, within heads or not."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.norms import LayerNorm, RMSNorm
from plait.ops.rms_norm import added_rms_norm, gated_rms_norm, rms_norm


def untouched(*modules: nn.Module) -> bool:
    """Whether nobody waits for these to be called, so that a kernel may do what they do."""
    return not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


class Norm(nn.Module):
    """Over the last axis, computed in float32 at least: x / rms(x) * w, or * (1 + w) where zero-centred (arXiv 1910.07467);
    or a LayerNorm (arXiv 1607.06450)."""

    def __init__(self, width: int, config: RMSNorm | LayerNorm):
        super().__init__()
        self.config = config
        start = 0.0 if isinstance(config, RMSNorm) and config.zero_centered else 1.0
        self.weight = nn.Parameter(torch.full((width,), start, dtype=torch.float32))
        biased = isinstance(config, LayerNorm) and config.bias
        self.bias = nn.Parameter(torch.zeros(width, dtype=torch.float32)) if biased else None

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        c = self.config
        if isinstance(c, RMSNorm):
            return rms_norm(x, self.weight, c.eps, c.zero_centered)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, c.eps)

    def of_sum(
        self, x: Float[Tensor, "*n d"], y: Float[Tensor, "*n d"]
    ) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n d"]]:
        """x + y, and its norm: one kernel in a decoding step on a GPU."""
        c = self.config
        if isinstance(c, RMSNorm):
            return added_rms_norm(x, y, self.weight, c.eps, c.zero_centered)
        total = x + y
        return total, self(total)


class HeadNorm(nn.Module):
    """A LayerNorm within each head, weight and bias per channel: of what a recurrence gives, whose scale is left open."""

    def __init__(self, heads: int, head_dim: int, eps: float, *, bias: bool = False):
        super().__init__()
        self.eps, width = eps, heads * head_dim
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(width, dtype=torch.float32)) if bias else None

    def forward(self, x: Float[Tensor, "b t h d"]) -> Float[Tensor, "b t h d"]:
        y, weight = F.layer_norm(x, x.shape[-1:], eps=self.eps), self.weight.to(x.dtype).view(x.shape[-2:])
        return y * weight if self.bias is None else torch.addcmul(self.bias.to(x.dtype).view(x.shape[-2:]), y, weight)


class GatedNorm(nn.Module):
    """What a recurrence gives, normed and gated: norm(x) silu(gate), or with `gate_first` norm(x silu(gate)), each of `groups`
    of channels normed alone. The weight starts at 1, whatever the design's norms do."""

    def __init__(self, width: int, eps: float, *, groups: int = 1, gate_first: bool = False):
        super().__init__()
        self.eps, self.groups, self.gate_first = eps, groups, gate_first
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "*n d"], gate: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        if self.groups == 1:
            return gated_rms_norm(x, gate, self.weight, self.eps, gate_first=self.gate_first)
        x, gate = (y.unflatten(-1, (self.groups, -1)) for y in (x, gate))
        return gated_rms_norm(x, gate, self.weight, self.eps, gate_first=self.gate_first).flatten(-2)
