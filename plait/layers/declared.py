"""From declared weights to modules: a layer's parameters are made from what its config says it learns."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.model import ModelConfig
from plait.design.norms import Norm as NormConfig
from plait.design.norms import RMSNorm, inner
from plait.design.weights import FLOAT32, Weight, Weights
from plait.layers.norm import Norm
from plait.layers.short_conv import ShortConv
from plait.layers.start import empty
from plait.ops.kernels import Call
from plait.ops.products import linear, widens


class Projection(nn.Linear):
    """y = W x + b, b on all rows or on named parts of them, + B A x where a shared layer's use has an addition of its own."""

    adapter_down: nn.Parameter | None
    adapter_up: nn.Parameter | None

    def __init__(self, weight: Weight, bias: Weight | None):
        nn.Module.__init__(self)  # the weights are drawn by the model, from seed and name
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = empty(weight), None if bias is None else empty(bias)
        self.parts = weight.parts
        biased = {name for name, _ in bias.parts} if bias is not None else set()
        some = biased and len(biased) < len(weight.parts)
        self.unbiased = tuple((size, name in biased) for name, size in weight.parts) if some else ()
        self.adapter_down = self.adapter_up = None
        self.adapted: frozenset[str] = frozenset()  # parts that have an addition each

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        y = linear(x, self.weight, self._bias() if self.unbiased else self.bias)
        if self.adapter_down is None or self.adapter_up is None:
            return y
        low = F.linear(x, self.adapter_down)
        return y + (self._by_part(low, self.adapter_up) if self.adapted else F.linear(low, self.adapter_up))

    def adapt(self, name: str, weight: Weight) -> None:
        """Take one of the two matrices of an addition of this use's own."""
        setattr(self, name, empty(weight))
        self.adapted = frozenset(part for part, _ in weight.parts)

    def _by_part(self, low: Float[Tensor, "*n r"], up: Float[Tensor, "o k"]) -> Float[Tensor, "*n o"]:
        """The additions to the parts that have one, zeros to the others."""
        lows = iter(low.chunk(len(self.adapted), -1))
        ups = iter(up.split([size for part, size in self.parts if part in self.adapted]))
        return torch.cat(
            [
                F.linear(next(lows), next(ups)) if part in self.adapted else low.new_zeros(*low.shape[:-1], size)
                for part, size in self.parts
            ],
            -1,
        )

    def _bias(self) -> Tensor | None:
        """The bias of every row, zeros where a part has none."""
        assert self.bias is not None
        rows = iter(self.bias.split([size for size, biased in self.unbiased if biased]))
        return torch.cat([next(rows) if biased else self.bias.new_zeros(size) for size, biased in self.unbiased])


class HeadProjection(nn.Module):
    """A projection within heads: head h reads its own channels of x and has a matrix of its own."""

    def __init__(self, weight: Weight, bias: Weight | None):
        super().__init__()
        self.weight, self.bias = empty(weight), None if bias is None else empty(bias)  # (h, g k, own), (g h k,)

    def forward(self, x: Float[Tensor, "b t d"], inputs: int) -> Float[Tensor, "b t g h k"]:
        if not widens(x, self.weight):
            return _within_heads(x, self.weight, self.bias, inputs)
        bias = None if self.bias is None else self.bias.float()
        return _within_heads(x.float(), self.weight.float(), bias, inputs).to(x.dtype)


def _within_heads(
    x: Float[Tensor, "b t d"], weight: Float[Tensor, "h m n"], bias: Float[Tensor, " gm"] | None, inputs: int
) -> Float[Tensor, "b t g h k"]:
    """One product per head, and seen in this order without a copy."""
    (b, t, _), (h, rows, own) = x.shape, weight.shape
    parts, weight = x.reshape(b * t, h, own).transpose(0, 1), weight.mT
    if bias is None:
        y = torch.bmm(parts, weight)  # (h, b t, g k)
    else:
        y = torch.baddbmm(bias.view(inputs, h, -1).transpose(0, 1).reshape(h, 1, rows), parts, weight)
    return y.view(h, b, t, inputs, -1).permute(1, 2, 3, 0, 4)


class DeclaredModule(nn.Module):
    """A module whose parameters are declared weights. Casting it leaves those that must be float32 at least as wide as that."""

    def __init__(self) -> None:
        super().__init__()
        self.wide: tuple[str, ...] = ()

    def declare(self, weights: Weights, norm: NormConfig) -> None:
        """Make the parameters, and the modules that they are in; weights of a module that is there already are its own."""
        self.wide = tuple(w.name for w in weights if w.role in FLOAT32)
        by_name = {weight.name: weight for weight in weights}
        for name, weight in by_name.items():
            path, _, leaf = name.rpartition(".")
            if not path:
                self.register_parameter(leaf, empty(weight))
            elif leaf == "weight" and not hasattr(self, path.partition(".")[0]):
                self.add_module(path, _module(weight, by_name.get(f"{path}.bias"), norm))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As of nn.Module, behind `to`, `half`, `bfloat16` and the like. A decay rounded to bfloat16 is another decay."""
        kept = [p for name, p in self.named_parameters(recurse=False) if name in self.wide]
        ids = {id(x) for p in kept for x in (p, p.grad) if x is not None}

        def careful(x: Tensor) -> Tensor:
            y = fn(x)
            narrow = id(x) in ids and y.is_floating_point() and y.dtype.itemsize < 4 and x.dtype.itemsize >= 4
            return x.to(y.device, torch.promote_types(y.dtype, torch.float32)) if narrow else y

        return super()._apply(careful if ids else fn, recurse)


class LayerModule(DeclaredModule):
    """A layer: `forward(x (b, t, reads), context, state) -> (y (b, t, dim), state)`; state in, state out; None in, None out.

    Its parameters are those that `config.weights` declares, each under its name.
    """

    def __init__(self, config: Any, design: ModelConfig):
        super().__init__()
        self.config = config
        self.assemble(design)
        self.declare(config.weights(design.dim, self.reads(design)), self.norms(design))

    @classmethod
    def ops(cls, config: Any, call: Call) -> Sequence[tuple[str, Any]]:
        """The ops that a layer of this config runs in such a call, each with the `sizes` that its forms ask about; what
        `plait doctor` prints."""
        return ()

    def assemble(self, design: ModelConfig) -> None:
        """Make the modules inside that are not simply made of their weights."""

    def norms(self, design: ModelConfig) -> RMSNorm:
        """What the layer's own norms are."""
        return inner(design.norm)

    def reads(self, design: ModelConfig) -> int | None:
        """Channels that the layer reads; None: the model's width."""
        return self.config.wrap.width(design.dim) if self.config.wrap else None

    def share(self, other: "LayerModule") -> None:
        """Become another use of a shared layer: its very weights."""
        for name, parameter in other.named_parameters():
            path, _, leaf = name.rpartition(".")
            if not leaf.startswith("adapter_"):
                setattr(self.get_submodule(path), leaf, parameter)

    def adapt(self, design: ModelConfig) -> None:
        """Add this use's own low-rank additions."""
        for weight in self.config.adapters(design.dim, self.reads(design)):
            path, _, leaf = weight.name.rpartition(".")
            self.get_submodule(path).adapt(leaf, weight)  # type: ignore[operator]  # a Projection


class MixerModule(LayerModule):
    """A layer of heads: `inner` gives their outputs side by side, and one projection takes them to the model's width, unless
    the merge of a parallel slot does that."""

    projection = "out_proj"

    def __init__(self, config: Any, design: ModelConfig):
        super().__init__(config, design)
        if not config.out_proj:
            self.register_module(self.projection, None)

    def inner(self, x: Float[Tensor, "b t d"], context: Any, state: Any) -> tuple[Float[Tensor, "b t w"], Any]:
        raise NotImplementedError(f"{type(self).__name__} has no inner(self, x, context, state)")

    def forward(self, x: Float[Tensor, "b t d"], context: Any, state: Any) -> tuple[Float[Tensor, "b t d"], Any]:
        y, state = self.inner(x, context, state)
        project = getattr(self, self.projection)
        return y if project is None else project(y), state


def _module(weight: Weight, bias: Weight | None, norm: NormConfig) -> nn.Module:
    if weight.role == "norm":
        return Norm(weight.shape[0], norm)
    if weight.role == "conv":
        return ShortConv(weight, bias)
    return Projection(weight, bias) if weight.role == "matrix" else HeadProjection(weight, bias)
