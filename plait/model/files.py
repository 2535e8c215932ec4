"""Models as folders: config.json and model.safetensors, and the tokenizer's files where one is given."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch

from plait.design.load import read_mapping
from plait.design.model import ModelConfig
from plait.design.spec import BYTES
from plait.design.spelling import suggest
from plait.files import write_atomic, write_text
from plait.model.build import cast
from plait.model.language_model import LanguageModel

CONFIG, WEIGHTS, ENDS = "config.json", "model.safetensors", "generation_config.json"
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


def save(model: LanguageModel, folder: str | Path, tokenizer: Saves | None = None) -> None:
    """Write the model (and tokenizer; a loaded model has kept its own) so that `plait.load` and transformers can read it.

    Each file is replaced whole.
    """
    if tokenizer is not None and tokenizer.vocab > model.design.vocab:
        raise ValueError(f"the tokenizer has {tokenizer.vocab} ids, but the model was built for {model.design.vocab}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    metadata = {"format": "pt", "design": model.design.hash}
    write_atomic(folder / WEIGHTS, lambda path: safetensors.torch.save_file(tensors, path, metadata))
    config = {
        "model_type": "plait",
        "architectures": ["PlaitForCausalLM"],
        "auto_map": AUTO_MAP,
        "dtype": str(model.dtype).removeprefix("torch."),
        "vocab_size": model.design.vocab,
        "design": model.design.to_dict(),
    }
    _write_json(folder / CONFIG, config)
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
    config: dict[str, Any] = {"eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.eos}
    beyond = list(range(tokenizer.vocab, vocab))
    return config | ({"suppress_tokens": beyond} if beyond else {})


def load(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
    """Read a saved model, or the newest checkpoint of a training run's folder. Raises ValueError naming what is wrong."""
    folder = model_folder(folder)
    config = read_config(folder)
    design = ModelConfig.from_dict(config["design"])
    tensors = _read_weights(folder / WEIGHTS, design)
    with torch.device("meta"):
        model = LanguageModel(design)
    model = cast(model, getattr(torch, config["dtype"])).to_empty(device=device)
    _fill(model, tensors, folder / WEIGHTS)
    model.tokenizer_files = {name: (folder / name).read_bytes() for name in TOKENIZER if (folder / name).is_file()}
    return model if dtype is None else cast(model, dtype)


def model_folder(folder: str | Path) -> Path:
    """The folder that holds config.json: itself, or the newest complete checkpoint of a run."""
    folder = Path(folder)
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


def _read_weights(path: Path, design: ModelConfig) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the folder holds a config without weights")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            written_for = (file.metadata() or {}).get("design", design.hash)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: corrupt or cut short ({error}), {os.path.getsize(path):,} bytes") from None
    if written_for != design.hash:
        raise ValueError(f"{path}: weights of design {written_for}, but {CONFIG} beside it describes {design.hash}")
    return tensors


def _fill(model: LanguageModel, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Copy tensors in; every parameter must be there, every tensor used, every shape equal."""
    parameters = dict(model.named_parameters())
    missing, unused = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or unused:
        raise ValueError(f"{path}: missing tensors {missing[:3]}, unused tensors {unused[:3]} (first three of each)")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
            )
        parameter.data.copy_(tensors[name])
