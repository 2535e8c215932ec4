"""Multi-head latent attention."""

from typing import Self

from plait.design.layers.layer import Mixer, wide_head_dim
from plait.design.layers.rope import RoPE
from plait.design.spec import Leaf, Memory
from plait.design.struct import DERIVED, positive
from plait.design.weights import Normal, Weight, Weights, norm, projection


class LatentAttention(Mixer, frozen=True, kw_only=True, tag="latent_attention"):
    """Multi-head latent attention (arXiv 2405.04434): keys and values of all heads are read off one latent of `rank` channels.

    A head's query and key have `nope_dim` channels without positions and `rope_dim` with, whose key all heads share; its value
    has `value_dim`. query_rank: queries come from a normed latent of their own. rope: null turns nothing (Kimi Linear).
    scale: on q . k; null: 1 / sqrt(nope_dim + rope_dim). latent_norm: whether latents are normed; false leaves a product of two
    matrices, which a layer of attention can be turned into (X-EcoMLA, arXiv 2503.11132).
    norm_eps: of the latents' norms; null: that of the design's norm. DeepSeek's latents have 1e-6, whatever the others have.

    Pairs (i, i + r/2) turn, as in all attention here. DeepSeek's checkpoints turn neighbours, (2i, 2i + 1): their rows for q
    and k with positions, the even ones first and then the odd ones, are ours.
    """

    heads: int = DERIVED
    nope_dim: int = DERIVED
    rope_dim: int = DERIVED
    value_dim: int = DERIVED
    rank: int = DERIVED
    query_rank: int | None = None
    rope: RoPE | None = RoPE()
    scale: float | None = None
    latent_norm: bool = True
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "heads", "nope_dim", "rope_dim", "value_dim", "rank", "query_rank", "scale", "norm_eps")

    def resolve(self, dim: int) -> Self:
        name = "LatentAttention"
        nope = self.nope_dim or (dim // self.heads if self.heads else wide_head_dim(dim, name, "nope_dim"))
        if not nope:
            raise ValueError(f"{name}: heads {self.heads} are more than dim {dim}; change heads or give nope_dim")
        if not self.heads and dim % nope:
            raise ValueError(f"{name}: dim {dim} is not a multiple of nope_dim {nope}, so heads must be given")
        rope = self.rope_dim or nope // 2 or 1
        if self.rope and rope % 2:
            raise ValueError(f"{name}: rope_dim {rope} is odd, which RoPE cannot turn; use an even one or rope: null")
        if self.rope:
            self.rope.check(name, rope)
        return self.replace(
            heads=self.heads or dim // nope,
            nope_dim=nope,
            rope_dim=rope,
            value_dim=self.value_dim or nope,
            rank=self.rank or min(4 * nope, dim),
        )

    @property
    def key_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    def inner(self) -> int:
        return self.heads * self.value_dim

    def rows(self) -> dict[str, int]:
        """Channels of the queries, or of their latent, of the keys' and values' latent, and of the key with positions."""
        return {"q": self.query_rank or self.heads * self.key_dim, "kv": self.rank, "k_rope": self.rope_dim}

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        low, queries, start = self.query_rank, self.heads * self.key_dim, Normal(self.rank**-0.5)
        return (
            *projection("in_proj", self.rows(), reads or dim),
            *((norm("q_norm", low),) if low and self.latent_norm else ()),
            *(projection("q_proj", queries, low) if low else ()),
            *((norm("kv_norm", self.rank),) if self.latent_norm else ()),
            Weight("k_up", (self.heads, self.nope_dim, self.rank), "blocks", start),
            Weight("v_up", (self.heads, self.value_dim, self.rank), "blocks", start),
            *self.output("o_proj", dim),
        )

    def mixing(self, dim: int, context: int) -> int:
        return 2 * self.heads * (self.key_dim + self.value_dim) * context

    def state(self, dim: int, dtype: str) -> Memory:
        return Memory("latent", (Leaf("c", (1, self.rank + self.rope_dim), dtype, "all"),))
