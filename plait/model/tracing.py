"""What of torch can record a call, and what cannot."""

import torch
from torch import Tensor, nn

from plait.design.layers import Attention, FeedForward
from plait.design.model import ModelConfig
from plait.design.places import layers


def refuse_tracing(model: nn.Module, design: ModelConfig, tokens: Tensor) -> None:
    """Raise ValueError where a recording would be right for the recorded length or without gradients alone, or fail in a less
    clear way."""
    if torch.jit.is_tracing():
        raise ValueError(
            "torch.jit.trace would freeze this call's length and states; use torch.compile, or torch.export for one length"
        )
    if not torch.compiler.is_exporting():
        return
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "torch.export drops the backward passes that plait's layers bring, and gradients would be wrong: export after "
            "model.requires_grad_(False); torch.compile takes gradients"
        )
    if tokens.ndim != 2 or not isinstance(tokens.shape[1], torch.SymInt):
        return
    fixed = [place.address for place in layers(design.slots) if not _any_length(place.layer)]
    if fixed:
        raise ValueError(
            f"torch.export of any length is not possible with layers {', '.join(fixed)}: their chunks are cut on the host; "
            "export one fixed length, or use torch.compile"
        )


def _any_length(layer: object) -> bool:
    return isinstance(layer, FeedForward) or (isinstance(layer, Attention) and layer.window is None)
