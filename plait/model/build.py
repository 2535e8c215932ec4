"""From a design to a model with fresh weights."""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from plait.design.load import load_design
from plait.design.model import ModelConfig
from plait.model.device import check_room
from plait.model.language_model import LanguageModel

OUTPUTS = ("o_proj", "out_proj", "down_proj")  # what writes into the residual stream
WIDE = ("A_log", "dt_bias", "D")  # never below float32: a decay rounded to bfloat16 is another decay


def build(
    design: ModelConfig | str | dict,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """A model with weights that depend on `seed` alone, not on the device or on torch's own random state."""
    design = load_design(design)
    for place in ("cpu", device):
        check_room(design, torch.device(place), dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LanguageModel(design)
        init_weights(model)
    return cast(model, dtype).to(device)


class _Undrawn(TorchFunctionMode):
    """Leaves new weights as they are. (On the meta device, drawing them would load torch's whole compiler.)"""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__module__", "") == nn.init.__name__ or func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def empty_model(
    design: ModelConfig, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A model with room for weights, which are whatever was in memory."""
    with torch.device(device), _Undrawn():
        return cast(LanguageModel(design), dtype)


def init_weights(model: LanguageModel) -> None:
    """Linear weights N(0, 1/fan_in), those that write into the residual stream smaller by sqrt(number of slots), so that
    its variance does not grow with depth; embeddings N(0, 1/dim). All other parameters were set by their own layers."""
    nn.init.normal_(model.embed.weight, std=model.design.dim**-0.5)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            depth = len(model.slots) if name.rsplit(".", 1)[-1] in OUTPUTS else 1
            nn.init.normal_(module.weight, std=(module.in_features * depth) ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def cast(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """All parameters to `dtype`, decay parameters to at least float32."""
    for name, parameter in model.named_parameters():
        wide = name.rsplit(".", 1)[-1] in WIDE
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32) if wide else dtype)
    return model
