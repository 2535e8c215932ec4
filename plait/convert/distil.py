"""Distillation: the whole student learns the teacher's next-token distribution (`plait.model.Distillation`)."""

from typing import Any

import torch
from torch import Tensor

from plait.convert.remembered import Remembered
from plait.model import CrossEntropy, Distillation, LanguageModel, Mixed
from plait.model.build import empty_model
from plait.model.files import stored
from plait.model.top_kl import TopKL


class FromDisk(Distillation):
    """Distillation from what the teacher has said of the training text; it runs for other text alone, as for what was held
    out."""

    def __init__(self, model: LanguageModel, teacher: LanguageModel, said: Remembered, *, cross_entropy: float = 0.0):
        super().__init__(model, teacher, cross_entropy=cross_entropy)
        self.said = said

    def scored(self, batch: Any) -> Tensor:
        return (batch.targets.flatten() >= 0) & self.said.known(batch).to(batch.targets.device)

    def count(self, batch: Any) -> Tensor:
        return super().count(batch) if batch.places is None else self.scored(batch).sum()

    def rule(self, batch: Any) -> Any:
        if batch.places is None:
            return super().rule(batch)
        ids, logp, left = (x.to(batch.inputs.device) for x in self.said.read(batch))
        scored = self.scored(batch)
        kl = TopKL(ids.int(), logp, left, scored)
        if not self.cross_entropy:
            return kl
        text = CrossEntropy(torch.where(scored.view_as(batch.targets), batch.targets, -100))
        return Mixed(((1.0, kl), (self.cross_entropy, text)))


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
