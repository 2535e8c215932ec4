"""Channel mixers: two projections with a nonlinearity between, token by token."""

from typing import Self

from plait.design.layers.layer import Layer
from plait.design.struct import DERIVED, positive
from plait.design.weights import Weights, projection


class FeedForward(Layer, frozen=True, kw_only=True):
    """What the channel mixers share: `hidden` channels between two projections."""

    hidden: int = DERIVED
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "hidden")

    def rows(self) -> dict[str, int]:
        """Channels of what is projected into."""
        return {"up": self.hidden}

    def default_hidden(self, dim: int) -> int:
        return 4 * dim

    def resolve(self, dim: int) -> Self:
        return self.replace(hidden=self.hidden or self.default_hidden(dim))

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        return (
            *projection("up_proj", self.rows(), reads or dim, bias=self.bias),
            *projection("down_proj", dim, self.hidden, bias=self.bias, writes=True),
        )


class Gated(FeedForward, frozen=True, kw_only=True):
    """down(act(gate_scale * gate x) * up x) (arXiv 2002.05202); `hidden` defaults to 8/3 dim rounded to 64."""

    gate_scale: float = 1.0

    def rows(self) -> dict[str, int]:
        return {"gate": self.hidden, "up": self.hidden}

    def default_hidden(self, dim: int) -> int:
        return max(64, round(dim * 8 / 3 / 64) * 64)


class SwiGLU(Gated, frozen=True, kw_only=True, tag="swiglu"):
    """down(silu(gate x) * up x) (arXiv 2002.05202); `hidden` defaults to 8/3 dim rounded to 64. `gate_scale`: on gate x
    (Falcon-H1, arXiv 2507.22448)."""


class GEGLU(Gated, frozen=True, kw_only=True, tag="geglu"):
    """down(gelu(gate x) * up x) (arXiv 2002.05202, the tanh form Gemma uses); `hidden` defaults to 8/3 dim rounded to 64.
    `gate_scale`: on gate x. `exact`: gelu itself, not its tanh form (Zamba2)."""

    exact: bool = False


class GELU(FeedForward, frozen=True, kw_only=True, tag="gelu"):
    """down(gelu(up x)) (arXiv 1606.08415, the tanh form GPT-2 uses); `hidden` defaults to 4 dim."""


class ReLU2(FeedForward, frozen=True, kw_only=True, tag="relu2"):
    """down(relu(up x)^2) (arXiv 2109.08668); `hidden` defaults to 4 dim."""
