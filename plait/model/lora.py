"""Low-rank additions on a model's projections: put on, merged into them, and told apart from the weights below."""

import hashlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design import declared
from plait.design.lora import LoRA, adapted_modules, lora_weights
from plait.design.weights import Weight
from plait.layers.declared import Projection
from plait.layers.start import start
from plait.model.language_model import LanguageModel


class Base(NamedTuple):
    """What additions were made for: where its weights lie, and the `weights_hash` of them in float32."""

    name: str
    hash: str


class AdaptedProjection(Projection):
    """A projection with an addition; its own weights keep their names and are frozen."""

    def __init__(self, inner: Projection, down: Weight, up: Weight, lora: LoRA):
        nn.Module.__init__(self)
        self.out_features, self.in_features, self.parts = inner.out_features, inner.in_features, inner.parts
        self.weight, self.bias, self.unbiased = inner.weight, inner.bias, inner.unbiased
        self.adapter_down = self.adapter_up = None  # `lora_targets` leaves out what has these
        self.lora_A, self.lora_B = Projection(down, None), Projection(up, None)
        self.scale, self.dropout = lora.scale, lora.dropout
        self.plain = (inner,)  # in a tuple, where torch does not see a module: it holds the very same weights

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        down = self.lora_A(F.dropout(x, self.dropout, self.training) if self.dropout else x)
        return super().forward(x) + self.lora_B(down) * self.scale

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The one matrix that does the same; summed in float32 at least."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        addition = self.lora_B.weight.to(wide) @ self.lora_A.weight.to(wide)
        return self.weight.to(wide).add(addition, alpha=self.scale).to(self.weight.dtype)


def adapt(model: LanguageModel, lora: LoRA, base: Base) -> LanguageModel:
    """`model` with fresh additions, which alone have gradients from now on; in place."""
    model.requires_grad_(False)
    weights = lora_weights(model.design, lora)
    by_name = {weight.name: weight for weight in weights}
    for name in adapted_modules(model.design, lora):
        inner = model.get_submodule(name)
        assert isinstance(inner, Projection), name
        pair = by_name[f"{name}.lora_A.weight"], by_name[f"{name}.lora_B.weight"]
        _put(model, name, AdaptedProjection(inner, *pair, lora).to(model.device).train(inner.training))
    start(model, weights, lora.seed)
    model.lora, model.base = lora, base
    return model


def merge(model: LanguageModel) -> LanguageModel:
    """The model with its additions in the projections themselves, and no others; in place."""
    for name, module in _adapted(model).items():
        module.weight.data = module.merged()
        (plain,) = module.plain
        plain.weight, plain.bias = module.weight, module.bias  # others than it had, where torch has put others in
        _put(model, name, plain.train(module.training))
    model.lora = model.base = None
    parameters = dict(model.named_parameters())
    for weight in declared.weights(model.design):
        parameters[weight.name].requires_grad_(weight.role != "balance")
    return model


def additions(model: LanguageModel) -> dict[str, nn.Parameter]:
    """A and B of every adapted projection, by name."""
    return {
        f"{name}.{part}.weight": getattr(module, part).weight
        for name, module in _adapted(model).items()
        for part in ("lora_A", "lora_B")
    }


def merged_tensors(model: LanguageModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of all the model's tensors by name, those of the model that it would be once merged."""
    own = additions(model)
    merged = {f"{name}.weight": module.merged() for name, module in _adapted(model).items()}
    return {name: merged.get(name, tensor) for name, tensor in tensors.items() if name not in own}


def weights_hash(tensors: dict[str, Tensor]) -> str:
    """Hex digest of names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]  (numpy's annotation)
    return digest.hexdigest()[:32]


def _adapted(model: LanguageModel) -> dict[str, AdaptedProjection]:
    return {
        name.replace("_orig_mod.", ""): module  # torch.compile's, around a slot
        for name, module in model.named_modules()
        if isinstance(module, AdaptedProjection)
    }


def _put(model: LanguageModel, name: str, module: Any) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
