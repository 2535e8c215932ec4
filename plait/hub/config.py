"""A design as a transformers config."""

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from plait.design.model import ModelConfig
from plait.model.files import AUTO_MAP, write_code


class PlaitConfig(PreTrainedConfig):
    """`design` is the model; `vocab_size`, `hidden_size` and `num_hidden_layers` are read from it for whoever asks."""

    model_type = "plait"
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["past_key_values"]

    design: dict[str, Any] | ModelConfig | None = None
    use_cache: bool = True
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    tie_word_embeddings: bool = False  # a tied model has one parameter here, so that there is nothing to tie

    def __post_init__(self, **kwargs: Any) -> None:
        if self.design is None:
            raise ValueError("PlaitConfig needs design=..., a plait.ModelConfig or its to_dict()")
        model = self.design if isinstance(self.design, ModelConfig) else ModelConfig.from_dict(self.design)
        self.design = model.to_dict()
        self.vocab_size, self.hidden_size, self.num_hidden_layers = model.vocab, model.dim, len(model.slots)
        self.tie_word_embeddings = False
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    @property
    def model_config(self) -> ModelConfig:
        """The design, parsed."""
        return ModelConfig.from_dict(self.to_dict()["design"])

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As everywhere in transformers, and the few lines of code by which the folder is read without an import."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_code(Path(save_directory))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: transformers would copy this file into saved folders, which import the installed plait instead."""
