"""Norms: what a residual step, an embedding or a query may be normed by."""

from typing import Any

from plait.design.struct import Struct, convert_kind, positive
from plait.design.weights import Constant, Weight, Weights


class RMSNorm(Struct, frozen=True, kw_only=True, tag="rms_norm"):
    """x / rms(x) times w (arXiv 1910.07467); `zero_centered`: times 1 + w with w starting at 0 (Gemma, Qwen3-Next)."""

    eps: float = 1e-6
    zero_centered: bool = False

    def __post_init__(self) -> None:
        positive(self, "eps")

    def weights(self, name: str, width: int) -> Weights:
        return (Weight(f"{name}.weight", (width,), "norm", Constant(0.0 if self.zero_centered else 1.0)),)


class LayerNorm(Struct, frozen=True, kw_only=True, tag="layer_norm"):
    """(x - mean(x)) / std(x) times w, plus b where there is a bias (arXiv 1607.06450)."""

    eps: float = 1e-5
    bias: bool = True

    def __post_init__(self) -> None:
        positive(self, "eps")

    def weights(self, name: str, width: int) -> Weights:
        weight = Weight(f"{name}.weight", (width,), "norm", Constant(1.0))
        bias = Weight(f"{name}.bias", (width,), "bias", Constant(0.0))
        return (weight, bias) if self.bias else (weight,)


Norm = RMSNorm | LayerNorm
NORM_KINDS: dict[str, type[Norm]] = {"rms_norm": RMSNorm, "layer_norm": LayerNorm}


def read_norm(data: Any, where: str) -> Norm:
    """A norm from plain data; a mapping that names no kind is an RMSNorm."""
    if isinstance(data, dict) and "kind" not in data:
        data = {"kind": "rms_norm", **data}
    return convert_kind(data, NORM_KINDS, where)


def inner(norm: Norm) -> RMSNorm:
    """The norm of heads and of what a recurrence gives: always an RMSNorm, with the design's eps."""
    return norm if isinstance(norm, RMSNorm) else RMSNorm(eps=norm.eps)
