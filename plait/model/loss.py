"""Next-token loss without holding all logits at once."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.model.language_model import LanguageModel
from plait.ops.graph import gradient, whole

IGNORE = -100  # a target that is not scored, as everywhere in the field
SLICE = 2**25  # logits in one slice: 128 MiB of float32


def token_loss(
    model: LanguageModel,
    inputs: Int[Tensor, "b t"],
    targets: Int[Tensor, "b t"],
    *,
    cu_seqlens: Int[Tensor, " n+1"] | None = None,
    attention_mask: Tensor | None = None,
    stats: dict[str, Any] | None = None,
) -> tuple[Float[Tensor, ""], int]:
    """Sum over the scored targets of -log p in nats (float32 or wider), and how many were scored (target not -100)."""
    if targets.shape != inputs.shape:
        raise ValueError(f"targets must have the inputs' shape {tuple(inputs.shape)}, got {tuple(targets.shape)}")
    hidden, _ = model.features(inputs, cu_seqlens=cu_seqlens, attention_mask=attention_mask, stats=stats)
    train = torch.is_grad_enabled()
    total = _head_loss(hidden.flatten(0, 1), model.head_weight, targets.flatten(), train)
    return total, int((targets != IGNORE).sum())


class _HeadLoss(torch.autograd.Function):
    """Head and cross-entropy in one, slice by slice. The gradient of a slice's logits is softmax - one-hot, known as soon
    as the logits are; so it is used at once, and neither logits nor probabilities outlive their slice."""

    @staticmethod
    def forward(
        ctx, hidden: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], targets: Int[Tensor, " n"], train: bool
    ) -> Float[Tensor, ""]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide)
        dhidden = torch.empty_like(hidden) if train else hidden
        dweight = torch.zeros_like(weight, dtype=wide) if train else weight
        rows = max(1, SLICE // len(weight))
        for first in range(0, len(hidden), rows):
            h, target = hidden[first : first + rows], targets[first : first + rows]
            scored = (target != IGNORE).to(wide)[:, None]
            target = target.clamp_min(0)[:, None]
            logp = (h @ weight.T).to(wide).log_softmax(-1)  # (rows, v)
            total = total - (logp.gather(1, target) * scored).sum()
            if train:
                dlogits = logp.exp_().scatter_add_(1, target, -torch.ones_like(scored)).mul_(scored).to(h.dtype)
                dhidden[first : first + rows] = dlogits @ weight.to(h.dtype)
                dweight += dlogits.T @ h
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @gradient
    def backward(ctx, dtotal: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        dhidden, dweight = ctx.saved_tensors
        return dhidden * dtotal.to(dhidden.dtype), (dweight * dtotal).to(ctx.weight_dtype), None, None


_head_loss = whole(_HeadLoss)
