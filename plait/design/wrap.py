"""How a layer sits on the residual stream."""

from typing import Any, Literal

import msgspec

from plait.design.norms import Norm, RMSNorm, read_norm
from plait.design.struct import Struct


class Wrap(Struct, frozen=True, kw_only=True, tag=False):
    """keep * x + factor * after(f(before(x))). What a layer's own `wrap` leaves out is the design's.

    norms: where the norms stand: "before" (the default), "after" (OLMo-2), "both" (Gemma-2) or "none".
    norm: which norm that is; else the design's.     factor: on what is added (Granite's residual multiplier).
    keep: the factor on what it is added to.     residual: which is the "stream" x, or the "normed" one, before(x) (MiniMax-01).
    gives: to the "stream"; or the stream stays as it is, and what comes out is what the next slot reads, alone ("next") or
    added to the stream ("next_added"; both Zamba2).
    reads: "stream", or "stream_and_embeddings": x beside the embeddings x0, 2 dim channels (Zamba2).
    value_residual: attention's values are l1 v + l2 v0, v0 the model's first attention layer's (arXiv 2410.17897).
    """

    norms: Literal["before", "after", "both", "none"] | None = None
    norm: Any = None
    factor: float | None = None
    keep: float | None = None
    residual: Literal["stream", "normed"] | None = None
    gives: Literal["stream", "next", "next_added"] | None = None
    reads: Literal["stream", "stream_and_embeddings"] | None = None
    value_residual: bool | None = None

    def __post_init__(self) -> None:
        if self.norm is not None:
            msgspec.structs.force_setattr(self, "norm", read_norm(self.norm, "wrap.norm"))

    def over(self, other: "Wrap") -> "Wrap":
        """This wrap, with what it leaves out taken from `other`."""
        set_here = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return other.replace(**set_here)

    @property
    def before(self) -> Norm | None:
        return self.norm if self.norms in ("before", "both") else None

    @property
    def after(self) -> Norm | None:
        return self.norm if self.norms in ("after", "both") else None

    def width(self, dim: int) -> int:
        """Channels that the layer reads."""
        return 2 * dim if self.reads == "stream_and_embeddings" else dim


PLAIN = Wrap(
    norms="before",
    norm=RMSNorm(),
    factor=1.0,
    keep=1.0,
    residual="stream",
    gives="stream",
    reads="stream",
    value_residual=False,
)
