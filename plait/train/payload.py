"""The tensors of a checkpoint on disk: the model's, the optimizers' and the random number generators'."""

from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from plait.data import Tokenizer
from plait.files import write_atomic
from plait.model import LanguageModel
from plait.model import save as save_model
from plait.model.files import read_model, save_additions
from plait.opening import read_adapted
from plait.run_folder import TENSORS
from plait.train.optim import Optimizers


class Payload(Protocol):
    """How they lie in a checkpoint's folder. Whatever it is, the folder is a model's."""

    def save(self, folder: Path, model: LanguageModel, tokenizer: Tokenizer | None, optimizers: Optimizers) -> None: ...

    def load_model(self, folder: Path, device: torch.device, base: str | None) -> LanguageModel:
        """base: where the weights lie that additions in the folder are made for; they stay additions. None: it has none."""
        ...

    def restore(self, folder: Path, optimizers: Optimizers) -> None:
        """Put optimizers and random number generators where they were."""
        ...


class Safetensors:
    """The model as `plait.save` writes it, or its additions where those are what is trained; all else in one file."""

    def save(self, folder: Path, model: LanguageModel, tokenizer: Tokenizer | None, optimizers: Optimizers) -> None:
        if model.lora is None:
            save_model(model, folder, tokenizer)
        else:
            save_additions(model, folder, tokenizer)
        tensors = {f"optimizer.{name}": tensor.contiguous() for name, tensor in optimizers.tensors().items()}
        write_atomic(folder / TENSORS, lambda path: save_file(tensors | _random_states(), path))

    def load_model(self, folder: Path, device: torch.device, base: str | None) -> LanguageModel:
        return read_model(folder, device) if base is None else read_adapted(folder, base, device)

    def restore(self, folder: Path, optimizers: Optimizers) -> None:
        try:
            tensors = load_file(folder / TENSORS)
        except SafetensorError as error:
            raise ValueError(f"{folder / TENSORS}: cannot be read ({error})") from None
        torch.set_rng_state(tensors.pop("rng.torch"))
        cuda = [tensors.pop(name) for name in sorted(tensors, key=len) if name.startswith("rng.cuda.")]
        if len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)
        optimizers.load_tensors({name.removeprefix("optimizer."): tensor for name, tensor in tensors.items()})


SAFETENSORS = Safetensors()


def _random_states() -> dict[str, Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"rng.torch": torch.get_rng_state()} | {f"rng.cuda.{index}": state for index, state in enumerate(cuda)}
