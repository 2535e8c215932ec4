"""`plait.load`: a model from whatever holds one, plait's own folders or another library's."""

from pathlib import Path

import torch

from plait.data.gguf_file import gguf_path
from plait.design.load import is_foreign
from plait.design.lora import LoRA
from plait.design.model import ModelConfig
from plait.files import user_path
from plait.model.adapter_files import base_name, read_additions, read_lora
from plait.model.build import to_dtype
from plait.model.device import check_dtype, find_device
from plait.model.files import BASE_HASH, carried_files, model_folder, read_config, read_model, stored, stored_design
from plait.model.language_model import LanguageModel
from plait.model.lora import Base, adapt, merge, weights_hash
from plait.run_folder import ADAPTER_CONFIG, check_model


def load(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
    """Read a saved model, the newest checkpoint of a training run's folder, a folder of transformers whose family
    `plait.hub.families` has, or a GGUF file of a Llama: by its path, or by the name of a model that an installed package ships
    ("smollm2").

    Every tensor has the dtype that it has in the file, unless `dtype` says otherwise; those of a GGUF file, which are
    quantised, are float32 then. Additions (LoRA) are merged, in float32, into the weights that they were trained on. Raises
    ValueError naming what is wrong, and the newest whole checkpoint where this one is damaged.
    """
    device = find_device(device)
    if dtype is not None:
        check_dtype(dtype)
    if (file := gguf_path(folder)) is not None:
        from plait.hub.gguf import read_gguf

        return read_gguf(file, device, dtype)
    folder = check_model(model_folder(folder))
    if (folder / ADAPTER_CONFIG).is_file():
        model = merge(read_adapted(folder, base_name(folder), device))
        return model if dtype is None else to_dtype(model, dtype)
    if not is_foreign(folder):
        return read_model(folder, device, dtype)
    from plait.hub.checkpoint import read  # transformers takes a second to import

    return read(folder, device, dtype)


def model_path(spec: str | Path) -> Path:
    """The GGUF file or the folder that holds what `load` would give, and its tokenizer."""
    return gguf_path(spec) or model_folder(spec)


def folder_design(folder: str | Path) -> ModelConfig:
    """The design of what `load` would give, without reading weights."""
    if (file := gguf_path(folder)) is not None:
        from plait.hub.gguf import design_of_gguf

        return design_of_gguf(file)
    folder = model_folder(folder)
    if not is_foreign(folder):
        return stored_design(folder)
    from plait.hub.checkpoint import folder_design as theirs

    return theirs(folder)


def adaptable(start: str | Path, lora: LoRA, device: str | torch.device = "cpu") -> LanguageModel:
    """The model of a folder in float32, with fresh additions."""
    model, place = load(start, device, torch.float32), user_path(start)
    name = str(model_folder(place).resolve()) if place.exists() else str(start)
    return adapt(model, lora, Base(name, weights_hash(stored(model))))


def read_adapted(folder: Path, base: str | Path, device: str | torch.device = "cpu") -> LanguageModel:
    """The model below, loaded from `base` in float32, with the additions that `folder` holds. Raises ValueError where `base`
    does not hold the weights that they were trained on."""
    config = read_config(folder)
    try:
        model = adaptable(base, read_lora(folder), device)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{base}: not there, and {folder} holds additions to it alone; put it back, or say in {ADAPTER_CONFIG} where it is"
        ) from None
    assert model.base is not None
    if model.design.hash != stored_design(folder).hash or model.base[1] != config.get(BASE_HASH):
        raise ValueError(
            f"{base}: not the weights that the additions in {folder} were trained on, or they have changed since"
        )
    read_additions(model, folder)
    model.tokenizer_files = carried_files(folder)
    return model
