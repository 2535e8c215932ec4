"""Next-token loss without holding all logits at once."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from plait.model.language_model import LanguageModel

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
    scored = int((targets != IGNORE).sum())
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    rows = max(1, SLICE // model.design.vocab)
    if len(hidden) <= rows:
        return _nll(model, hidden, targets), scored
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        part = checkpoint(_nll, model, h, t, use_reentrant=False) if torch.is_grad_enabled() else _nll(model, h, t)
        total = total + part
    return total, scored


def _nll(model: LanguageModel, hidden: Float[Tensor, "n d"], targets: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    logits = model.head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
