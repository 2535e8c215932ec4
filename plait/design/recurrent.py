"""Configs of the nonlinear recurrences: what a unit keeps, how units hear of each other, and what stands around them."""

from typing import ClassVar, Literal, Self

from plait.design.layer import Layer, default_head_dim, told
from plait.design.spec import StateSpec, TensorSpec, wide
from plait.design.struct import positive

Solver = Literal["shooting", "deer", "quasi_deer", "elk", "quasi_elk", "sequential"]

EMPTY = -1e4  # the log of a normaliser that has seen nothing: its exponential is 0 even in float64


class Recurrent(Layer, frozen=True, kw_only=True):
    """A cell of heads * head_dim units between projections: out_proj(norm(h) * silu(gate)), h from silu(conv(x)).

    recurrence: who hears of h: "diagonal" each unit of itself, "heads" the units of a head of each other, "dense" all.
    projection: "heads" lets each head read its own dim / heads channels. conv_width: null for no convolution.
    output_gate: false leaves out_proj(h). recurrent_bias: a second bias, as in torch.nn.GRU.
    gate_bias: where the bias of the gate that keeps starts; two numbers: spread evenly over the units of each head.
    spread: recurrent numbers per unit start uniform in [-spread, spread]; null: Xavier's normal, small, which suits text.
    Around 1 a unit can flip its state from the start, as parity asks.
    clip: recurrent and peephole weights are held in [-clip, clip] (arXiv 2510.21450 trains language models with 0.5).
    solver, tol, max_passes, strict: how the recurrence is solved in parallel over time, as in `plait.ops.shooting`.
    """

    only_how = ("solver", "tol", "max_passes", "strict")
    keeps: ClassVar[tuple[str, int] | None] = None  # the gate that keeps: its input's name, and which sign opens it

    heads: int | None = None
    head_dim: int | None = None
    recurrence: Literal["diagonal", "heads", "dense"] = "diagonal"
    projection: Literal["dense", "heads"] = "dense"
    conv_width: int | None = 4
    output_gate: bool = True
    bias: bool = True
    recurrent_bias: bool = False
    gate_bias: float | tuple[float, float] = 0.0
    spread: float | None = None
    clip: float | None = None
    solver: Solver = "shooting"
    tol: float | None = None
    max_passes: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        positive(self, "heads", "head_dim", "conv_width", "spread", "clip", "tol", "max_passes")
        if self.keeps is None and self.gate_bias != 0:
            raise ValueError(f"{type(self).__name__} has no gate that keeps, so gate_bias must be 0")

    def sizes(self) -> tuple[int, int, int]:
        """A unit's inputs, states, and weights besides the recurrent ones."""
        raise NotImplementedError

    def start(self) -> tuple[float, ...]:
        """A unit's states before the first token; empty: zeros."""
        return ()

    def resolve(self, dim: int) -> Self:
        name = type(self).__name__
        if self.head_dim is None and self.heads and dim % self.heads:
            raise ValueError(f"{name}: heads {self.heads} do not divide dim {dim}; change heads or give head_dim")
        head_dim = self.head_dim or (dim // self.heads if self.heads else default_head_dim(dim, name))
        if self.heads is None and dim % head_dim:
            raise ValueError(f"{name}: dim {dim} is not a multiple of head_dim {head_dim}; give heads")
        heads = self.heads or dim // head_dim
        if self.projection == "heads" and dim % heads:
            raise ValueError(f"{name}: heads {heads} do not divide dim {dim}, which projection 'heads' needs")
        return self.replace(heads=heads, head_dim=head_dim)

    def units(self) -> int:
        return told(self.heads) * told(self.head_dim)

    def groups(self) -> tuple[int, int]:
        """Heads and units per head as the recurrence sees them: all units are one head where it is dense."""
        return (1, self.units()) if self.recurrence == "dense" else (told(self.heads), told(self.head_dim))

    def _matrices(self, dim: int) -> int:
        """Weights that matrix products read."""
        units, (g, _, _), (heads, k) = self.units(), self.sizes(), self.groups()
        seen = dim if self.projection == "dense" else dim // told(self.heads)
        recurrent = 0 if self.recurrence == "diagonal" else g * heads * k * k
        return g * units * seen + recurrent + dim * units * (1 + self.output_gate)

    def parameters(self, dim: int) -> int:
        units, (g, _, weights) = self.units(), self.sizes()
        conv = dim * (self.conv_width + self.bias) if self.conv_width else 0
        vectors = g * (self.recurrence == "diagonal") + g * self.bias + g * self.recurrent_bias
        return self._matrices(dim) + conv + units * (vectors + weights + self.output_gate)

    def flops(self, dim: int, context: int) -> int:
        return 2 * self._matrices(dim)

    def state(self, dim: int, batch: int, length: int, dtype: str) -> StateSpec:
        _, states, _ = self.sizes()
        s = TensorSpec("s", (batch, states, *self.groups()), wide(dtype), self.start())
        return StateSpec("recurrent", (s, TensorSpec("conv", (batch, (self.conv_width or 1) - 1, dim), dtype)))


class RNN(Recurrent, frozen=True, kw_only=True, tag="rnn"):
    """Elman's network, h = tanh(x + m) or relu, as `torch.nn.RNN`; m is R h of the step before."""

    activation: Literal["tanh", "relu"] = "tanh"

    def sizes(self) -> tuple[int, int, int]:
        return 1, 1, 0


class GRU(Recurrent, frozen=True, kw_only=True, tag="gru"):
    """GRU (arXiv 1406.1078), as `torch.nn.GRU` and, diagonal, ParaGRU (arXiv 2510.21450): h = (1 - z) h + z c."""

    keeps = ("z", -1)

    def sizes(self) -> tuple[int, int, int]:
        return 3, 1, 0


class LSTM(Recurrent, frozen=True, kw_only=True, tag="lstm"):
    """LSTM, as `torch.nn.LSTM`: c = f c + i z, h = o tanh(c). coupled: i = 1 - f. peephole: the gates also read c.

    With both it is ParaLSTM (arXiv 2510.21450).
    """

    keeps = ("f", 1)

    coupled: bool = False
    peephole: bool = False

    def sizes(self) -> tuple[int, int, int]:
        gates = 3 if self.coupled else 4
        return gates, 2, (gates - 1) * self.peephole


class SLSTM(Recurrent, frozen=True, kw_only=True, tag="slstm"):
    """sLSTM (arXiv 2405.04517): exponential input gate, normaliser, recurrence within heads."""

    keeps = ("f", 1)

    recurrence: Literal["diagonal", "heads", "dense"] = "heads"

    def sizes(self) -> tuple[int, int, int]:
        return 4, 3, 0

    def start(self) -> tuple[float, ...]:
        return 0.0, 0.0, EMPTY
