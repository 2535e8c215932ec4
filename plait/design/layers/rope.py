"""Rotary positions, and how they are stretched to longer texts than a model was first trained on."""

from typing import Any

from plait.design.struct import Struct, convert_kind, positive


class Scaling(Struct, frozen=True, kw_only=True):
    """What all ways to stretch positions share."""

    factor: float

    def __post_init__(self) -> None:
        positive(self, "factor")

    @property
    def key(self) -> tuple[Any, ...]:
        """What the angles depend on."""
        return type(self).__name__, *(getattr(self, name) for name in self.__struct_fields__)


class Linear(Scaling, frozen=True, kw_only=True, tag="linear"):
    """Positions count a `factor` as fast (arXiv 2306.15595)."""


class NTK(Scaling, frozen=True, kw_only=True, tag="ntk"):
    """theta times factor^(r / (r - 2)) for r channels that turn: the slowest pair turns a `factor` as fast, the fastest as ever
    (NTK-aware scaling; arXiv 2309.00071, section 3.1)."""


class YaRN(Scaling, frozen=True, kw_only=True, tag="yarn"):
    """Pairs that turn less than beta_slow times in `original` positions turn a `factor` as fast, those that do so more than
    beta_fast times as ever, those between in between (arXiv 2309.00071, section 3.2).

    attention_factor: on queries and keys; null: 0.1 ln(factor) + 1. truncate: whether the bounds between are whole numbers.
    """

    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "original", "beta_fast", "beta_slow", "attention_factor")
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"YaRN.beta_fast {self.beta_fast} must be above beta_slow {self.beta_slow}")


class Llama3(Scaling, frozen=True, kw_only=True, tag="llama3"):
    """Pairs that turn less than `low` times in `original` positions turn a `factor` as fast, those that do so more than `high`
    times as ever, those between in between (Llama 3.1)."""

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "low", "high", "original")
        if self.high <= self.low:
            raise ValueError(f"Llama3.high {self.high} must be above low {self.low}")


class LongRoPE(Scaling, frozen=True, kw_only=True, tag="longrope"):
    """Pair i turns a factors[i] as fast (arXiv 2402.13753), in models for texts a `factor` as long as `original` positions.

    attention_factor: on queries and keys; null: sqrt(1 + ln(factor) / ln(original)).
    Phi-3 has other factors for all positions of a text that is longer than `original`, which `max_positions` then refuses: keys
    that are kept would no longer be right.
    """

    original: int
    factors: tuple[float, ...]
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "original", "attention_factor")
        self._set("factors", tuple(map(float, self.factors)))
        if self.original < 2 or not all(factor > 0 for factor in self.factors):
            raise ValueError(
                f"LongRoPE: factors must be above 0 and original above 1, got {self.factors} and {self.original}"
            )


SCALINGS: dict[str, type[Scaling]] = {
    "linear": Linear,
    "ntk": NTK,
    "yarn": YaRN,
    "llama3": Llama3,
    "longrope": LongRoPE,
}
DYNAMIC = (
    "RoPE.scaling: 'dynamic' turns one position by other angles the longer a text becomes, so that keys which are kept would "
    "no longer be right; 'ntk' with the factor of the longest text is a function of the position alone"
)


class RoPE(Struct, frozen=True, kw_only=True, tag=False):
    """Rotary positions (arXiv 2104.09864): the first `fraction` of each head turns with the position.

    scaling: linear, ntk, yarn, llama3 or longrope, with their numbers: {kind: yarn, factor: 4, original: 32768}.
    `max_positions` is how far the model may be used: longer sequences are refused. None: no limit.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    max_positions: int | None = None
    scaling: Any = None

    def __post_init__(self) -> None:
        positive(self, "theta", "max_positions")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"RoPE.fraction must be in (0, 1], got {self.fraction}; for none at all write rope: null")
        if self.scaling is not None:
            if "dynamic" in (self.scaling, *(self.scaling.values() if isinstance(self.scaling, dict) else ())):
                raise ValueError(DYNAMIC)
            self._set("scaling", convert_kind(self.scaling, SCALINGS, "RoPE.scaling"))
            if isinstance(self.scaling, YaRN) and self.theta <= 1:
                raise ValueError(
                    f"RoPE.theta must be above 1 for yarn, got {self.theta}: no pair turns slower than another"
                )

    def rotated(self, head_dim: int) -> int:
        """How many of a head's channels turn; even."""
        return int(head_dim * self.fraction) // 2 * 2

    def check(self, name: str, head_dim: int) -> None:
        """Raise ValueError where a layer's heads have another number of pairs than there are factors."""
        scaling, pairs = self.scaling, self.rotated(head_dim) // 2
        if isinstance(scaling, LongRoPE) and len(scaling.factors) != pairs:
            raise ValueError(f"{name}.rope.scaling: {len(scaling.factors)} factors, and {pairs} pairs of a head turn")


class Temperature(Struct, frozen=True, kw_only=True, tag=False):
    """Queries at position p times 1 + scale ln(1 + floor((p + 1) / every)): sharper weights the further on in a text
    (arXiv 2501.19399, as in Llama 4)."""

    scale: float = 0.1
    every: int = 8192

    def __post_init__(self) -> None:
        positive(self, "scale", "every")
