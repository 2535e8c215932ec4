"""From a design to a model with fresh weights."""

import torch

from plait.design import declared
from plait.design.load import load_design
from plait.design.model import ModelConfig
from plait.design.weights import FLOAT32
from plait.layers.start import start
from plait.model.device import check_dtype, check_room, find_device
from plait.model.language_model import LanguageModel


def build(
    design: ModelConfig | str | dict,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """A model whose every weight depends on `seed` and its own name alone: not on other layers, the device, or what torch's
    random state and default dtype are. On the device "meta" it has no values; `init_weights` then fills it in."""
    design = load_design(design)
    check_dtype(dtype)
    if str(device) == "meta":
        return empty_model(design, device=device, dtype=dtype)
    device = find_device(device)
    check_room(design, device, dtype)
    return init_weights(empty_model(design, device=device, dtype=dtype), seed)


def empty_model(
    design: ModelConfig, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A model with room for weights, which are whatever was in memory."""
    check_dtype(dtype)
    with torch.inference_mode(False), torch.device(device):
        return to_dtype(LanguageModel(design), dtype)


def init_weights(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """Draw every weight that lies in memory, as `build` does; on several ranks each may draw its own."""
    parameters = dict(model.named_parameters())
    start(model, tuple(w for w in declared.weights(model.design) if not parameters[w.name].is_meta), seed)
    return model


def to_dtype(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """All parameters to `dtype`, decay parameters to at least float32."""
    wide = {weight.name for weight in declared.weights(model.design) if weight.role in FLOAT32}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32) if name in wide else dtype)
    return model
