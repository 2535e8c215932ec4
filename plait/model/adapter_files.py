"""Additions to projections on disk, as PEFT writes them: adapter_config.json and adapter_model.safetensors."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from plait.design.load import read_mapping
from plait.design.lora import LoRA, adapted_modules
from plait.design.struct import convert
from plait.files import write_atomic, write_text
from plait.model.language_model import LanguageModel
from plait.model.lora import additions
from plait.run_folder import ADAPTER_CONFIG

ADAPTER = "adapter_model.safetensors"
PREFIX = "base_model.model.model."  # PEFT's for the model it wraps, and PlaitForCausalLM's for ours
FIELDS = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}
# What PEFT can do besides; any other value makes another model of the same tensors.
PLAIN: dict[str, Any] = {
    **{"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False},
    **{"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": None},
}


def write_additions(model: LanguageModel, folder: Path) -> None:
    """Both files. Every projection is named in full."""
    assert model.lora is not None and model.base is not None
    folder.mkdir(parents=True, exist_ok=True)
    values = {theirs: getattr(model.lora, ours) for ours, theirs in FIELDS.items()}
    config = {
        **PLAIN,
        **values,
        "target_modules": adapted_modules(model.design, model.lora),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.base[0],
        "inference_mode": True,
    }
    tensors = {PREFIX + name: tensor.detach().contiguous() for name, tensor in additions(model).items()}
    write_atomic(folder / ADAPTER, lambda path: safetensors.torch.save_file(tensors, path, {"format": "pt"}))
    write_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")


def base_name(folder: Path) -> str:
    """Where the weights lie that the additions in `folder` are made for."""
    name = read_mapping(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is {name!r}; expected a model's folder")
    return name


def read_lora(folder: Path) -> LoRA:
    """What adapter_config.json says of the additions. Raises ValueError for what plait's are not."""
    path = folder / ADAPTER_CONFIG
    config = read_mapping(path)
    for name, value in PLAIN.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {config[name]!r}; plait reads LoRA with {name} {value!r} alone")
    missing = [theirs for theirs in FIELDS.values() if theirs not in config]
    if missing:
        raise ValueError(f"{path}: {missing[0]!r} is missing")
    return convert({ours: config[theirs] for ours, theirs in FIELDS.items()}, LoRA, str(path))


def read_additions(model: LanguageModel, folder: Path) -> None:
    """Fill the model's additions; each tensor must be there, be used, and have the right shape."""
    path = folder / ADAPTER
    try:
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; the folder holds {ADAPTER_CONFIG} without additions") from None
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: corrupt or cut short ({error})") from None
    own = {PREFIX + name: parameter for name, parameter in additions(model).items()}
    missing, unused = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unused:
        raise ValueError(f"{path}: missing tensors {missing[:3]}, unused tensors {unused[:3]} (first three of each)")
    with torch.no_grad():
        for name, parameter in own.items():
            if tensors[name].shape != parameter.shape:
                shapes = f"{tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
                raise ValueError(f"{path}: {name} has shape {shapes}")
            parameter.copy_(tensors[name])
