"""Weights as data: a layer says once what it learns, and everything else is read off it.

Modules are built from the declaration, and parameters, matrix FLOPs, initialisation, weight decay, float32 islands, Muon's
blocks and LoRA targets are derived from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

# matrix: a projection (rows out, columns in), a module that is called.  blocks: matrices of other shapes that an op reads.
# experts: matrices (n, rows, columns) side by side, of which a token passes some; each is one of its own to Muon.
# embedding: a table of rows.  norm, bias, vector: one number per channel, head or unit.  conv: a row per channel.
# decay: how fast a state forgets, and what else is ruined by rounding; float32 at least, whatever the model's dtype.
# balance: no gradient, moved by training itself (`plait.train.balance`); float32 at least.
Role = Literal["matrix", "blocks", "experts", "embedding", "norm", "bias", "vector", "conv", "decay", "balance"]

MULTIPLIED: tuple[Role, ...] = ("matrix", "blocks", "experts")  # one multiply-add for each number and token
DECAYED: tuple[Role, ...] = ("matrix", "blocks", "experts", "embedding")  # weight decay pulls these towards zero
ORTHOGONAL: tuple[Role, ...] = ("matrix", "experts")  # Muon's
FLOAT32: tuple[Role, ...] = ("decay", "balance")


@dataclass(frozen=True, slots=True)
class Normal:
    """N(0, std^2)."""

    std: float


@dataclass(frozen=True, slots=True)
class Uniform:
    """U(low, high), then `log` of it; or the `step`: what softplus turns into exp of it; or the Lambda of an RG-LRU whose
    decay it is with an open gate: what softplus turns into -log of it, over 8."""

    low: float
    high: float
    then: Literal["", "log", "step", "rg_lru"] = ""


@dataclass(frozen=True, slots=True)
class Constant:
    value: float


@dataclass(frozen=True, slots=True)
class Ramp:
    """Zeros but for run `index` of `runs` equal ones, in which every head of `k` units goes from `low` to `high`, evenly or as
    a `power` of that; then `log` of it."""

    index: int
    runs: int
    k: int
    low: float
    high: float
    then: Literal["", "log"] = ""
    power: float = 1.0


Start = Normal | Uniform | Constant | Ramp


@dataclass(frozen=True, slots=True)
class Weight:
    """name: its path in the layer's module. shape: as torch has it, rows first. parts: named runs of rows, in order.

    start: how it is drawn; None for a norm that starts as the design's norms do. writes: into the residual stream, so that
    it starts smaller the deeper the model. used: the share of tokens that pass through it (experts: top-k of n).
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    start: Start | None
    parts: tuple[tuple[str, int], ...] = ()
    writes: bool = False
    used: float = 1.0

    @property
    def key(self) -> str:
        """What it is drawn by, beside the seed: its name. Short convolutions were once weights of the layers themselves, and a
        seed gives what it gave."""
        return self.name.replace("conv1d.", "conv1d_")

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def flops(self) -> int:
        """Forward FLOPs for one token, 2 for each multiply-add."""
        return round(2 * self.numel * self.used) if self.role in MULTIPLIED else 0

    def inside(self, prefix: str) -> "Weight":
        """The same weight as part of a larger module."""
        return replace(self, name=f"{prefix}{self.name}")


Weights = tuple[Weight, ...]
Bias = bool | tuple[str, ...]


def projection(
    name: str, rows: int | Mapping[str, int], columns: int, *, bias: Bias = False, writes: bool = False
) -> Weights:
    """NAME.weight (rows, columns), N(0, 1/columns), and NAME.bias for all rows or for the named parts, zeros."""
    parts = tuple(rows.items()) if isinstance(rows, Mapping) else ()
    total = sum(rows.values()) if isinstance(rows, Mapping) else rows
    weight = Weight(f"{name}.weight", (total, columns), "matrix", Normal(columns**-0.5), parts, writes)
    biased = [(part, size) for part, size in parts if bias is True or (bias and part in bias)]
    if not bias or (parts and not biased):
        return (weight,)
    size = sum(size for _, size in biased) if parts else total
    return weight, Weight(f"{name}.bias", (size,), "bias", Constant(0.0), tuple(biased))


def norm(name: str, width: int, *, plain: bool = False) -> Weight:
    """NAME.weight of an RMSNorm. plain: times w, starting at 1, also where the design's norms are zero-centred."""
    return Weight(f"{name}.weight", (width,), "norm", Constant(1.0) if plain else None)


def short_conv(channels: int | Mapping[str, int], width: int, bias: bool) -> Weights:
    """A depthwise causal convolution, uniform in +-1/sqrt(width) as torch's, of channels or of named runs of them."""
    parts = tuple(channels.items()) if isinstance(channels, Mapping) else ()
    total = sum(channels.values()) if isinstance(channels, Mapping) else channels
    start = Uniform(-(width**-0.5), width**-0.5)
    weight = Weight("conv1d.weight", (total, width), "conv", start, parts)
    return (weight, Weight("conv1d.bias", (total,), "bias", start, parts)) if bias else (weight,)


def total(weights: Weights) -> int:
    """How many numbers they are."""
    return sum(weight.numel for weight in weights)


def active(weights: Weights) -> int:
    """How many of them a token passes through."""
    return sum(round(weight.numel * weight.used) for weight in weights)
