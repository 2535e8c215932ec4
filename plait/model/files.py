"""Models as folders: config.json and safetensors, and the tokenizer's files where one is given."""

import json
from functools import partial
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
from plait.files import user_path, write_atomic, write_text
from plait.model.adapter_files import write_additions
from plait.model.build import empty_model, to_dtype
from plait.model.language_model import LanguageModel
from plait.model.lora import Base, merged_tensors
from plait.model.weight_files import SHARD_BYTES, WeightFiles, weight_files, write_weights
from plait.run_folder import FACTS, checkpoints

CONFIG, ENDS = "config.json", "generation_config.json"
BASE_HASH = "base_hash"  # in the config beside additions: `weights_hash` of what they were trained on
# What a tokenizer may have left in a folder: a loaded model takes it along to where it is saved next.
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json", ENDS),
)
# transformers has no plugins: a folder says itself which code reads it, and is believed with trust_remote_code=True
CODE = "modeling_plait.py"
AUTO_MAP = {"AutoConfig": "modeling_plait.PlaitConfig", "AutoModelForCausalLM": "modeling_plait.PlaitForCausalLM"}
CODE_TEXT = '''"""Read by transformers with trust_remote_code=True; `import plait.hub` beforehand does the same without it."""

from plait.hub import PlaitConfig, PlaitForCausalLM  # noqa: F401
'''


class Saves(Protocol):
    """A tokenizer, as far as saving goes: it writes itself into a folder, has `vocab` ids, and `eos` ends a text."""

    @property
    def vocab(self) -> int: ...

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
    """Write the model (and tokenizer; a loaded model has kept its own) so that `plait.load` and transformers can read it.
    Each file is replaced whole.

    A model inside torch.compile, DataParallel or DistributedDataParallel is saved as itself, one with additions (LoRA) with
    those merged into its projections. Weights of more than
    `shard_bytes` go into several files with an index.
    """
    model, folder = bare(model), user_path(folder)
    if tokenizer is not None and not isinstance(getattr(tokenizer, "vocab", None), int):
        raise TypeError(f"expected a tokenizer that plait.load_tokenizer gave, got {type(tokenizer).__name__}")
    if tokenizer is not None and tokenizer.vocab > (model.design.vocab or 0):
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab} ids, but the model was built for {model.design.vocab or 0}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = stored(model) if model.lora is None else merged_tensors(model, stored(model))
    write_weights(folder, tensors, {"format": "pt", "design": model.design.hash}, shard_bytes)
    _write_rest(model, folder, tokenizer, {})


def save_additions(model: LanguageModel, folder: Path, tokenizer: Saves | None) -> None:
    """Write what `adapt` has put on the model, as PEFT does, and not the weights below."""
    assert model.lora is not None and model.base is not None
    base = Base(*model.base)
    write_additions(model, folder)
    _write_rest(model, folder, tokenizer, {BASE_HASH: base.hash})


def _write_rest(model: LanguageModel, folder: Path, tokenizer: Saves | None, more: dict[str, Any]) -> None:
    """What a folder holds beside weights."""
    config = {
        "model_type": "plait",
        "architectures": ["PlaitForCausalLM"],
        "auto_map": AUTO_MAP,
        "dtype": str(model.dtype).removeprefix("torch."),
        "vocab_size": model.design.vocab,
        "design": model.design.to_dict(),
        **({} if model.origin is None else {"origin": model.origin}),
    }
    _write_json(folder / CONFIG, config | more)
    write_code(folder)
    if tokenizer is not None:
        tokenizer.save(folder)
        _write_json(folder / ENDS, _generation_config(tokenizer, model.design.vocab))
        return
    for name, content in model.tokenizer_files.items():
        write_atomic(folder / name, partial(_write_bytes, content))


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def write_code(folder: Path) -> None:
    """The file that AUTO_MAP names."""
    write_text(folder / CODE, CODE_TEXT)


def _generation_config(tokenizer: Saves, vocab: int) -> dict[str, Any]:
    """Where transformers' generate reads that a text may end before max_new_tokens, and that a model's ids beyond the
    tokenizer's (a vocabulary padded to a round number) are never chosen."""
    ends = list(getattr(tokenizer, "ends", (tokenizer.eos,)))
    config: dict[str, Any] = {"eos_token_id": ends if len(ends) > 1 else tokenizer.eos, "pad_token_id": tokenizer.eos}
    beyond = list(range(tokenizer.vocab, vocab))
    return config | ({"suppress_tokens": beyond} if beyond else {})


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


def read_model(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
    """A model that `save` wrote to this folder, whose files have been found whole. Raises ValueError naming what is wrong."""
    config = read_config(folder)
    files = weight_files(folder)
    model = empty_model(_design(config, folder), device=device, dtype=getattr(torch, config["dtype"]))
    with torch.no_grad():
        _fill(model, files, torch.device(device))
    model.tokenizer_files = carried_files(folder)
    model.origin = config.get("origin")
    return model if dtype is None else to_dtype(model, dtype)


def carried_files(folder: Path) -> dict[str, bytes]:
    """What a folder holds of a tokenizer, by name."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER if (folder / name).is_file()}


def model_folder(folder: str | Path) -> Path:
    """The folder that holds config.json: itself, or the newest checkpoint of a run."""
    folder = user_path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a saved model or a training run")
    for path in (folder, *reversed(checkpoints(folder))):
        if (path / CONFIG).is_file() or (path / FACTS).is_file():  # with the second alone a damaged one, not none
            return path
    raise FileNotFoundError(f"{folder}: holds neither {CONFIG} nor checkpoints/step-*; expected a saved model or a run")


def stored_design(folder: Path) -> ModelConfig:
    """The design in config.json."""
    return _design(read_config(folder), folder)


def _design(config: dict[str, Any], folder: Path) -> ModelConfig:
    try:
        return ModelConfig.from_dict(config["design"])
    except ValueError as error:
        raise ValueError(f"{error}" if str(error).startswith(str(folder)) else f"{folder / CONFIG}: {error}") from None


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
