"""RWKV-7: its time mixing and its channel mixing."""

from typing import Self

from plait.design.layers.feed_forward import FeedForward
from plait.design.layers.layer import Mixer, head_sizes
from plait.design.spec import Leaf, Memory, recurrent
from plait.design.struct import DERIVED, positive
from plait.design.weights import Constant, Ramp, Weight, Weights, projection

SHIFTED = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}  # and the power that its start has in the paper


class RWKV7(Mixer, frozen=True, kw_only=True, tag="rwkv7"):
    """RWKV-7's time mixing (arXiv 2503.14456, section 4): a decay per channel, and a removal whose strength is per channel too.

    What is projected is between a token and the one before it. w (decays), a (strengths), v (the first layer's values) and g
    (output gate) have gates of low rank; ranks left out follow from the width as published. `value_residual`: values are mixed
    with those of the model's first such layer, which itself has it off in published models. norm_eps: of the heads' norm.
    removal_eps: added to the squared length of what is removed before that is made 1, as fused norms in flash-linear-attention
    do; null: nothing is.
    """

    heads: int = DERIVED
    head_dim: int = DERIVED
    decay_rank: int = DERIVED
    strength_rank: int = DERIVED
    value_rank: int = DERIVED
    gate_rank: int = DERIVED
    value_residual: bool = True
    norm_eps: float = 64e-5
    removal_eps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "heads", "head_dim", "decay_rank", "strength_rank", "value_rank", "gate_rank")
        positive(self, "norm_eps", "removal_eps")

    def resolve(self, dim: int) -> Self:
        heads, head_dim = head_sizes("RWKV7", dim, self.heads, self.head_dim, 64)
        return self.replace(
            heads=heads,
            head_dim=head_dim,
            decay_rank=self.decay_rank or _rank(2.5 * head_dim / 64, dim),
            strength_rank=self.strength_rank or _rank(2.5 * head_dim / 64, dim),
            value_rank=self.value_rank or _rank(1.7 * head_dim / 64, dim),
            gate_rank=self.gate_rank or _rank(5.0, dim),
        )

    def inner(self) -> int:
        return self.heads * self.head_dim

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        width, inner = reads or dim, self.inner()
        ranks = {"w": self.decay_rank, "a": self.strength_rank, "g": self.gate_rank, "v": self.value_rank}
        if not self.value_residual:
            del ranks["v"]
        residual = (_per_channel("v0", inner, 0.93, 0.53),) if self.value_residual else ()
        return (
            *(
                Weight(f"x_{name}", (width,), "vector", Ramp(0, 1, width, 1.0, 0.0, power=SHIFTED[name]))
                for name in SHIFTED
            ),
            *(weight for name in "rkv" for weight in projection(f"{name}_proj", inner, width)),
            *(weight for name, rank in ranks.items() for weight in _low_rank(name, inner, rank, width)),
            Weight("w0", (inner,), "decay", Ramp(0, 1, inner, -5.5, 0.5)),
            _per_channel("a0", inner, -0.39, 0.01),
            *residual,
            _per_channel("k_k", inner, 0.76, 0.66),
            Weight("k_a", (inner,), "vector", Constant(1.02)),
            Weight("r_k", (inner,), "vector", Constant(-0.04)),
            Weight("norm.weight", (inner,), "norm", Constant(1.0)),
            Weight("norm.bias", (inner,), "bias", Constant(0.0)),
            *self.output("out_proj", dim),
        )

    def mixing(self, dim: int, context: int) -> int:
        return 4 * 2 * self.heads * self.head_dim**2  # read S k, write it, write v k^T, read S q

    def state(self, dim: int, dtype: str) -> Memory:
        return recurrent((self.heads, self.head_dim, self.head_dim), 2, seen(self, dim), dtype)


class RWKV7FeedForward(FeedForward, frozen=True, kw_only=True, tag="rwkv7_feed_forward"):
    """RWKV-7's channel mixing (arXiv 2503.14456, section 4): down(relu(up x)^2), x between a token and the one before it."""

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        width = reads or dim
        return (Weight("x_k", (width,), "vector", Ramp(0, 1, width, 1.0, 0.0)), *super().weights(dim, reads))

    def state(self, dim: int, dtype: str) -> Memory:
        return Memory("shifted", (Leaf("conv", (seen(self, dim),), dtype, keep=1),))


def seen(layer: Mixer | FeedForward, dim: int) -> int:
    """Channels that the layer reads."""
    return layer.wrap.width(dim) if layer.wrap else dim


def _rank(factor: float, dim: int) -> int:
    return max(32, round(factor * dim**0.5 / 32) * 32)


def _per_channel(name: str, width: int, low: float, high: float) -> Weight:
    return Weight(name, (width,), "vector", Ramp(0, 1, width, low, high))


def _low_rank(name: str, rows: int, rank: int, columns: int) -> Weights:
    return *projection(f"{name}_down", rank, columns), *projection(f"{name}_up", rows, rank)
