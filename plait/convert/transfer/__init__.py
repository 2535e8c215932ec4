"""New layers that start from the attention layers whose places they take."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from plait.convert.parallel import new_places
from plait.convert.plan import Plan
from plait.convert.transfer.calibrate import calibrate
from plait.convert.transfer.calibrate import some_text as some_text
from plait.convert.transfer.latent import to_latent
from plait.convert.transfer.linear import to_delta, to_gla, to_kimi_delta, to_mamba2, to_mlstm, to_scalar_decay
from plait.convert.transfer.recurrent import to_cell
from plait.convert.transfer.window import to_attention
from plait.design.layers import (
    GLA,
    GRU,
    LSTM,
    MLSTM,
    Attention,
    DeltaNet,
    GatedDeltaNet,
    KimiDeltaAttention,
    LatentAttention,
    Layer,
    LightningAttention,
    Mamba2,
    RetNet,
    SimpleGLA,
)
from plait.design.places import pairs
from plait.layers.attention import AttentionLayer
from plait.layers.declared import LayerModule
from plait.model.language_model import LanguageModel
from plait.model.surgery import swap

# Each writes into the new layer what the old one's weights say of it; the rest stays as it was drawn.
TRANSFER: dict[type[Layer], Callable[[AttentionLayer, Any], None]] = {
    Attention: to_attention,
    LatentAttention: to_latent,
    Mamba2: to_mamba2,
    GatedDeltaNet: to_delta,
    DeltaNet: to_delta,
    KimiDeltaAttention: to_kimi_delta,
    GLA: to_gla,
    SimpleGLA: to_scalar_decay,
    LightningAttention: to_scalar_decay,
    RetNet: to_scalar_decay,
    MLSTM: to_mlstm,
    GRU: to_cell,
    LSTM: to_cell,
}


def student_of(teacher: LanguageModel, plan: Plan, *, text: Int[Tensor, "b t"] | None = None) -> LanguageModel:
    """The model that a plan makes of its teacher, before any training; the plan's seed draws what nothing is carried over to.

    With `text`, some thousands of tokens in rows that begin as texts do, gates, decays and output projections of recurrent
    layers are set by what the teacher's layers do with it (`plait.convert.transfer.calibrate`).
    All other modules are the teacher's very objects: train a copy (`copy.deepcopy`) where these are to change. The teacher
    must be the plan's: `plan.check(teacher)` says so.
    """
    changes = plan.layers(teacher.design)
    student = swap(teacher, changes, seed=plan.seed)
    places = pairs(teacher.design.slots, student.design.slots)
    there = [
        (old.address, new.address) for old, now in places if old.address in changes for new in new_places(old, now)
    ]
    for old, new in there:
        transfer(teacher.place(old), student.place(new))
    if text is not None:
        _calibrated(teacher, student, there, text)
    return student


@torch.no_grad()
def transfer(old: nn.Module, new: nn.Module) -> None:
    """Start the new layer from the old one, in place."""
    assert isinstance(old, AttentionLayer) and isinstance(new, LayerModule)
    TRANSFER[type(new.config)](old, new)


@torch.no_grad()
def _calibrated(teacher: LanguageModel, student: LanguageModel, there: list[tuple[str, str]], text: Tensor) -> None:
    """Every layer by what the teacher's reads, as soon as it reads it, so that no two layers' inputs are held."""
    hooks = []
    for address, here in there:
        old, new = teacher.place(address), student.place(here)

        def hook(old: Any, inputs: Any, new: Any = new) -> None:
            calibrate(old, new, inputs[0])

        hooks.append(old.register_forward_pre_hook(hook))
    try:
        teacher.features(text)
    finally:
        for hook in hooks:
            hook.remove()
