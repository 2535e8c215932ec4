"""The head: from the last slot's normed output to logits, or to the numbers of a regression."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.ends import Head as HeadConfig
from plait.model.loss import Loss, head_loss
from plait.ops.products import linear


class Head:
    """`head(hidden)` gives the outputs, `head.loss(hidden, rule)` their loss without holding them all.

    It owns no weights: they are the model's `lm_head`, or its embeddings where those are tied. Both are called or read anew
    each time, so that an adapter, a hook or a quantised module put in their place acts.
    """

    def __init__(self, config: HeadConfig, lm_head: nn.Module | None, embed: nn.Module, bias: nn.Parameter | None):
        self.config, self.lm_head, self.embed, self.bias = config, lm_head, embed, bias

    def __call__(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n o"]:
        y = self._project(hidden)
        if self.config.scale != 1:
            y = y * self.config.scale
        cap = self.config.softcap
        return y if cap is None else cap * torch.tanh(y / cap)

    def loss(self, hidden: Float[Tensor, "b t d"], rule: Any) -> Loss:
        """The loss by a rule of `plait.model.loss`: CrossEntropy, KL, SquaredError, or Mixed."""
        return head_loss(hidden, self, self.weights, self.outputs, rule)

    @property
    def outputs(self) -> int:
        module = self.lm_head if self.lm_head is not None else self.embed
        return module.out_features if self.lm_head is not None else module.num_embeddings  # type: ignore[return-value]  # Linear, Embedding

    @property
    def weights(self) -> list[nn.Parameter]:
        """The parameters that the outputs depend on."""
        if self.lm_head is not None:
            return list(self.lm_head.parameters())
        return [*self.embed.parameters(), *([] if self.bias is None else [self.bias])]

    def _project(self, hidden: Tensor) -> Tensor:
        if self.lm_head is not None:
            return self.lm_head(_as(hidden, self.lm_head))
        if not isinstance(self.embed, nn.Embedding):
            raise ValueError(
                f"the embeddings are also the head's matrix, which {type(self.embed).__name__} around them would not change: "
                "adapt other layers, or build the design with tie_embeddings=False"
            )
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return linear(_as(hidden, self.embed), self.embed.weight, bias)


def _as(hidden: Tensor, module: nn.Module) -> Tensor:
    """`hidden` in the dtype of a head that was kept wider than the model; autocast does this by itself."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dtype == hidden.dtype:
        return hidden
    return hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(weight.dtype)
