"""Linear attention whose heads forget at one rate each: fixed (RetNet, lightning attention) or of the token (simple GLA)."""

from typing import Self

from plait.design.layers.layer import Mixer, head_sizes, wide_head_dim
from plait.design.layers.rope import RoPE
from plait.design.spec import Memory, recurrent
from plait.design.struct import DERIVED, positive
from plait.design.weights import Constant, Weight, Weights, norm, projection


class ScalarDecay(Mixer, frozen=True, kw_only=True):
    """What they share: S_t = a_t S_{t-1} + v_t k_t^T, o_t = S_t q_t, normed and times a gate. `heads` and `head_dim` are those
    of q and k, which `rope` turns by position."""

    heads: int = DERIVED
    head_dim: int = DERIVED
    value_head_dim: int = DERIVED
    rope: RoPE | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "heads", "head_dim", "value_head_dim")

    def default_values(self, head_dim: int) -> int:
        return head_dim

    def resolve(self, dim: int) -> Self:
        name, given = type(self).__name__, self.heads or self.head_dim
        heads, head_dim = head_sizes(name, dim, self.heads, self.head_dim, 0 if given else wide_head_dim(dim, name))
        values = self.value_head_dim or self.default_values(head_dim)
        if self.rope is not None:
            self.rope.check(name, head_dim)
        return self.replace(heads=heads, head_dim=head_dim, value_head_dim=values)

    def inner(self) -> int:
        return self.heads * self.value_head_dim

    def rows(self) -> dict[str, int]:
        """Channels of q, k, v and of the output gate."""
        keys = self.heads * self.head_dim
        return {"q": keys, "k": keys, "v": self.inner(), "gate": self.inner()}

    def normed(self) -> int:
        """Channels of the norm's weight."""
        return self.value_head_dim

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        return (
            *projection("in_proj", self.rows(), reads or dim),
            norm("norm", self.normed(), plain=True),
            *self.output("out_proj", dim),
        )

    def mixing(self, dim: int, context: int) -> int:
        return 2 * 2 * self.inner() * self.head_dim  # write v k^T, read S q

    def state(self, dim: int, dtype: str) -> Memory:
        return recurrent((self.heads, self.value_head_dim, self.head_dim), 1, dim, dtype)


class RetNet(ScalarDecay, frozen=True, kw_only=True, tag="retnet"):
    """Retention (RetNet, arXiv 2307.08621): head i forgets at 1 - 2^(-5 - i), q and k are rotated by position, heads normed and
    times silu of the gate. Values are twice as wide as keys unless `value_head_dim` is given."""

    rope: RoPE | None = RoPE()

    def default_values(self, head_dim: int) -> int:
        return 2 * head_dim


class LightningAttention(ScalarDecay, frozen=True, kw_only=True, tag="lightning_attention"):
    """Lightning attention as in MiniMax-01 (arXiv 2501.08313): silu of q, k and v; head i of h, from 0, forgets at
    exp(-s 2^(-8 (i + 1) / h)); all heads are normed together and times the sigmoid of the gate. `slope` is s, which MiniMax
    gives layer l of L as 1 - l / (L - 1). `norm_eps` is that norm's; null: the design's."""

    slope: float = 1.0
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "slope", "norm_eps")

    def normed(self) -> int:
        return self.inner()


class SimpleGLA(ScalarDecay, frozen=True, kw_only=True, tag="simple_gla"):
    """Simple gated linear attention (GLA, arXiv 2312.06635, with one gate a head): a = sigmoid(g)^(1 / temper), g from the
    token; heads are normed and times silu of the gate."""

    temper: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "temper")

    def rows(self) -> dict[str, int]:
        return super().rows() | {"g": self.heads}

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        return (*super().weights(dim, reads), Weight("g_bias", (self.heads,), "decay", Constant(0.0)))
