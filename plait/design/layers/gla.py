"""Gated linear attention."""

from typing import Self

from plait.design.layers.layer import Mixer, divided
from plait.design.layers.rope import RoPE
from plait.design.spec import Memory, recurrent
from plait.design.struct import DERIVED, positive
from plait.design.weights import Weights, norm, projection


class GLA(Mixer, frozen=True, kw_only=True, tag="gla"):
    """Gated linear attention (arXiv 2312.06635): a decay per key channel, sigmoid of a low-rank projection to the power of
    1 / `temper`. `heads` defaults to 4, keys to half the model's width, values to all of it. rope: turns queries and keys by
    position."""

    heads: int = DERIVED
    head_dim: int = DERIVED
    value_head_dim: int = DERIVED
    gate_rank: int = 16
    temper: float = 16.0
    rope: RoPE | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "heads", "head_dim", "value_head_dim", "gate_rank", "temper")

    def resolve(self, dim: int) -> Self:
        heads = self.heads or 4
        head_dim = self.head_dim or divided("GLA", "head_dim", dim // 2, heads)
        value_head_dim = self.value_head_dim or divided("GLA", "value_head_dim", dim, heads)
        if self.rope is not None:
            self.rope.check("GLA", head_dim)
        return self.replace(heads=heads, head_dim=head_dim, value_head_dim=value_head_dim)

    def inner(self) -> int:
        return self.heads * self.value_head_dim

    def rows(self) -> dict[str, int]:
        """Channels of q, k, v, of the output gate z, and of what the decays are projected from."""
        key, value = self.heads * self.head_dim, self.inner()
        return {"q": key, "k": key, "v": value, "z": value, "decay": self.gate_rank}

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        rows = self.rows()
        return (
            *projection("in_proj", rows, reads or dim),
            *projection("decay_proj", rows["k"], self.gate_rank, bias=True),
            norm("norm", self.value_head_dim, plain=True),
            *self.output("out_proj", dim),
        )

    def mixing(self, dim: int, context: int) -> int:
        return 2 * 2 * self.heads * self.value_head_dim * self.head_dim  # write v k^T, read S q

    def state(self, dim: int, dtype: str) -> Memory:
        return recurrent((self.heads, self.value_head_dim, self.head_dim), 1, dim, dtype)
