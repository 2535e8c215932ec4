"""Models as folders: config.json and safetensors, and the tokenizer's files where one is given."""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from plait.design import declared
from plait.design.load import read_mapping
from plait.design.model import ModelConfig
from plait.design.spec import BYTES
from plait.design.spelling import suggest
from plait.design.weights import FLOAT32
from plait.files import user_path, write_text
from plait.model.build import cast, empty_model
from plait.model.language_model import LanguageModel
from plait.model.weight_files import SHARD_BYTES, WeightFiles, weight_files, write_weights

CONFIG, ENDS = "config.json", "generation_config.json"


class Saves(Protocol):
    """A tokenizer, as far as saving goes: it writes itself into a folder, and `eos` ends a text."""

    @property
    def eos(self) -> int: ...

    def save(self, folder: Path) -> None: ...


def save(
    model: LanguageModel | nn.Module,
    folder: str | Path,
    tokenizer: Saves | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model (and tokenizer) so that `plait.load` and transformers can read it. Each file is replaced whole.

    A model inside torch.compile, DataParallel or DistributedDataParallel is saved as itself. Weights of more than
    `shard_bytes` go into several files with an index.
    """
    model, folder = bare(model), user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, stored(model), {"format": "pt", "design": model.design.hash}, shard_bytes)
    config = {
        "model_type": "plait",
        "architectures": ["PlaitForCausalLM"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "vocab_size": model.design.vocab,
        "design": model.design.to_dict(),
    }
    _write_json(folder / CONFIG, config)
    if tokenizer is not None:
        tokenizer.save(folder)
        # where transformers' generate reads that a text may end before max_new_tokens
        _write_json(folder / ENDS, {"eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.eos})


def bare(model: nn.Module) -> LanguageModel:
    """The model inside whatever torch wraps around one."""
    inner = model
    while not isinstance(inner, LanguageModel):
        wrapped = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if not isinstance(wrapped, nn.Module):
            raise TypeError(f"expected a model that plait.build or plait.load gave, got {type(model).__name__}")
        inner = wrapped
    return inner


def stored(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Everything that a file holds: parameters, each once, and buffers, by names that no compiled part has changed."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {
        name.replace("_orig_mod.", ""): x.detach() for name, x in {**dict(model.named_parameters()), **buffers}.items()
    }


def load(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
    """Read a saved model, or the newest checkpoint of a training run's folder. Raises ValueError naming what is wrong.

    Every tensor has the dtype that it has in the file, unless `dtype` says otherwise.
    """
    folder = model_folder(folder)
    config = read_config(folder)
    design = ModelConfig.from_dict(config["design"])
    files = weight_files(folder)
    model = empty_model(design, device=device, dtype=getattr(torch, config["dtype"]))
    with torch.no_grad():
        _fill(model, files, torch.device(device))
    return model if dtype is None else cast(model, dtype)


def model_folder(folder: str | Path) -> Path:
    """The folder that holds config.json: itself, or the newest complete checkpoint of a run."""
    folder = user_path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a saved model or a training run")
    if (folder / CONFIG).is_file():
        return folder
    found = sorted((p.parent for p in folder.glob(f"checkpoints/step-*/{CONFIG}")), key=lambda p: (len(p.name), p.name))
    if not found:
        raise FileNotFoundError(
            f"{folder}: holds neither {CONFIG} nor checkpoints/step-*; expected a saved model or a run"
        )
    return found[-1]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, checked to be ours."""
    config = read_mapping(folder / CONFIG)
    if config.get("model_type") != "plait":
        raise ValueError(f"{folder / CONFIG}: model_type is {config.get('model_type')!r}, expected 'plait'")
    if "design" not in config:
        raise ValueError(f"{folder / CONFIG}: 'design' is missing")
    if config.get("dtype") not in BYTES:
        raise ValueError(
            f"{folder / CONFIG}: dtype {config.get('dtype')!r}; {suggest(str(config.get('dtype')), BYTES)}"
        )
    return config


def _write_json(path: Path, data: dict[str, Any]) -> None:
    write_text(path, json.dumps(data, indent=2) + "\n")


def _fill(model: LanguageModel, files: WeightFiles, device: torch.device) -> None:
    """Put every tensor in its place, one after the other; each must be there, be used, and have the right shape."""
    wide = {weight.name for weight in declared.weights(model.design) if weight.role in FLOAT32}
    places = stored(model)
    files.check(places.keys(), model.design.hash)
    owners = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in files:
        if tensor.shape != places[name].shape:
            raise ValueError(
                f"{files.path_of(name)}: {name} has shape {tuple(tensor.shape)}, expected {tuple(places[name].shape)}"
            )
        dtype = torch.promote_types(tensor.dtype, torch.float32) if name in wide else tensor.dtype
        if not dtype.is_floating_point and places[name].is_floating_point():
            raise ValueError(f"{files.path_of(name)}: {name} is {dtype}; expected floating point numbers")
        if places[name].dtype == dtype:  # into memory that torch aligned: rounding must not depend on the file
            places[name].copy_(tensor)
        else:
            owners[name].data = tensor.to(device, dtype, copy=True)
