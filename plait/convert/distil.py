"""Distillation: the whole student learns the teacher's next-token distribution (`plait.model.Distillation`)."""

import torch

from plait.model import LanguageModel
from plait.model.build import empty_model
from plait.model.files import stored


def untied(model: LanguageModel) -> LanguageModel:
    """The same model with a head of its own, which begins as its embeddings. Small tied models learn badly from a teacher
    while one matrix has to serve both ends (arXiv 2505.03005, section 8)."""
    tensors = stored(model)
    own = {"lm_head.weight": tensors["embed.weight"]}
    if "lm_head_bias" in tensors:
        own["lm_head.bias"] = tensors.pop("lm_head_bias")
    return _with(model, tensors | own, tied=False)


def retied(model: LanguageModel) -> LanguageModel:
    """The model whose head is its embeddings again; the head that it had of its own is dropped."""
    tensors = stored(model)
    del tensors["lm_head.weight"]
    if "lm_head.bias" in tensors:
        tensors["lm_head_bias"] = tensors.pop("lm_head.bias")
    return _with(model, tensors, tied=True)


def _with(model: LanguageModel, tensors: dict[str, torch.Tensor], tied: bool) -> LanguageModel:
    """A model of these tensors, copied, in the dtypes that they have."""
    made = empty_model(model.design.replace(tie_embeddings=tied), device=model.device, dtype=model.dtype)
    places = stored(made)
    assert places.keys() == tensors.keys()
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(tensors[name])
    made.tokenizer_files = model.tokenizer_files
    return made
