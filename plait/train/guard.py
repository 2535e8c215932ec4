"""Where NaN and infinity come from."""

from typing import Any

import torch
from torch import Tensor, nn

from plait.model import LanguageModel, Objective
from plait.train.step import backward


def places(model: LanguageModel) -> list[tuple[str, nn.Module]]:
    """The model's parts in the order they compute, each with the name that tables and patterns give it."""
    slots = zip((slot.address for slot in model.design.slots), model.slots, strict=True)
    return [("embed", model.embed), *slots, ("norm", model.norm)]


def weights_finite(model: LanguageModel) -> bool:
    """Whether every weight is a number."""
    return bool(torch.stack(torch._foreach_norm(list(model.parameters()), torch.inf)).isfinite().all())


def nonfinite_weights(model: LanguageModel) -> str | None:
    """The first part of the model with a weight that is no number."""
    for name, module in places(model):
        bad = [what for what, weight in module.named_parameters() if not weight.isfinite().all()]
        if bad:
            return f"the weights of {name} ({bad[0]})"
    return None


def first_nonfinite(objective: Objective, batch: Any, precision: str) -> str:
    """Run `batch` again and say in which layer the first value stops being finite; drops the gradients."""
    model = objective.model
    if weights := nonfinite_weights(model):
        return weights
    outputs: dict[str, bool] = {}
    gradients: dict[str, bool] = {}

    def watch(name: str):
        def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, object]) -> None:
            y = output if isinstance(output, Tensor) else output[0]
            outputs[name] = bool(y.isfinite().all())
            if y.requires_grad:
                y.register_hook(lambda grad: gradients.update({name: bool(grad.isfinite().all())}))

        return hook

    checkpointing, model.activation_checkpointing = model.activation_checkpointing, False
    hooks = [module.register_forward_hook(watch(name)) for name, module in places(model)]
    try:
        model.zero_grad(set_to_none=True)
        with torch.compiler.set_stance("force_eager"):
            backward(objective, batch, 1, precision)
        return _blame(model, outputs, gradients)
    finally:
        for handle in hooks:
            handle.remove()
        model.zero_grad(set_to_none=True)
        model.activation_checkpointing = checkpointing


def _blame(model: LanguageModel, outputs: dict[str, bool], gradients: dict[str, bool]) -> str:
    order = places(model)
    for name, _ in order:
        if not outputs.get(name, True):
            return f"the output of {name}"
    # Backward, what enters a part is the gradient of its output; what leaves it is that of the part before.
    for index in range(len(order) - 1, -1, -1):
        name, module = order[index]
        if not gradients.get(name, True):
            return f"the gradient of {order[index + 1][0]}" if index + 1 < len(order) else "the gradient of the loss"
        for what, weight in module.named_parameters():
            if weight.grad is not None and not weight.grad.isfinite().all():
                return f"the gradient of {name} ({what})"
    return "the loss"
