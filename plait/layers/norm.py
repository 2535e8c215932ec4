"""RMSNorm."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.model import RMSNorm
from plait.ops.rms_norm import rms_norm


class Norm(nn.Module):
    """x / rms(x) * w, or * (1 + w) where zero-centred (arXiv 1910.07467); over the last axis, in float32 at least."""

    def __init__(self, width: int, config: RMSNorm):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.config = config
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.config.zero_centered else 1.0)

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        return rms_norm(x, self.weight, self.config.eps, self.config.zero_centered)
