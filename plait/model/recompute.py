"""Which activations of a slot are kept for the backward pass, and which are computed again there."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from plait.ops.operator import CHEAP

Choice = Literal["cheap"] | bool

PRODUCTS = ("aten::mm", "aten::addmm", "aten::_grouped_mm")
ATTENTION = ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention")


def recomputed(choice: Choice, slot: nn.Module) -> Callable[..., Any] | None:
    """torch's checkpoint, to call a function of the slot through; None where all that is needed is kept.

    True keeps what the slot reads. "cheap" keeps the results of products with weights, attention and kernels too, so that
    norms, gates, activations, casts, and recurrences in chunks of torch's products are computed twice. Of a compiled slot the
    compiler decides, by much the same rule.
    """
    if not choice or not torch.is_grad_enabled():
        return None
    if choice is True:
        return partial(checkpoint, use_reentrant=False)
    if choice != "cheap":
        raise ValueError(f"activation_checkpointing is True, False or 'cheap'; got {choice!r}")
    if torch.compiler.is_compiling() or slot._compiled_call_impl is not None:
        return None
    return partial(checkpoint, _without_cache, use_reentrant=False, context_fn=_contexts)


def _without_cache(run: Callable[..., Any], *args: Any) -> Any:
    """Autocast keeps the weights that it has cast until the forward pass ends: run again without these, there would be more
    casts than there were, and torch goes by their number. Gradients of weights used more than once then add up in float32."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return run(*args)
    finally:
        torch.set_autocast_cache_enabled(before)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op._schema.name
    ours = name.startswith("plait::") and name.removeprefix("plait::") not in CHEAP
    kept = ours or name in PRODUCTS or name.startswith(ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
