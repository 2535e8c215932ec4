"""Configs of the nonlinear recurrences: what a unit keeps, how units hear of each other, and what stands around them."""

from typing import ClassVar, Literal, Self

from plait.design.layers.layer import Mixer, head_sizes, wide_head_dim
from plait.design.spec import Memory, recurrent
from plait.design.struct import DERIVED, positive
from plait.design.weights import (
    Constant,
    Normal,
    Ramp,
    Start,
    Uniform,
    Weight,
    Weights,
    norm,
    projection,
    short_conv,
)

Solver = Literal["shooting", "sequential"]

EMPTY = -1e4  # the log of a normaliser that has seen nothing: its exponential is 0 even in float64


class NonlinearRecurrence(Mixer, frozen=True, kw_only=True):
    """A cell of heads * head_dim units between projections: out_proj(norm(h) * silu(gate)), h from silu(conv(x)).

    recurrence: who hears of h: "diagonal" each unit of itself, "heads" the units of a head of each other, "dense" all.
    projection: "heads" lets each head read its own dim / heads channels. conv_width: null for no convolution.
    output_gate: false leaves out_proj(h). recurrent_bias: a second bias, as in torch.nn.GRU.
    gate_bias: where the bias of the gate that keeps starts; two numbers: spread evenly over the units of each head.
    spread: recurrent numbers per unit start uniform in [-spread, spread]; null: Xavier's normal, which is small. Around 1, as
    in GRU and LSTM, a unit can flip its state from the start, as parity asks, and text is no worse for it.
    clip: recurrent and peephole weights are held in [-clip, clip] (arXiv 2510.21450 trains language models with 0.5).
    solver, tol, max_passes, strict: how the recurrence is solved in parallel over time, as in `plait.ops.shooting`.
    """

    only_how = ("solver", "tol", "max_passes", "strict")
    keeps: ClassVar[tuple[int, int] | None] = None  # the gate that keeps: which input it is, and which sign opens it

    heads: int = DERIVED
    head_dim: int = DERIVED
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
        super().__post_init__()
        positive(self, "heads", "head_dim", "conv_width", "spread", "clip", "tol", "max_passes")
        if self.keeping() is None and self.gate_bias != 0:
            raise ValueError(f"{type(self).__name__} has no gate that keeps, so gate_bias must be 0")

    def keeping(self) -> tuple[int, int] | None:
        """`keeps`, where it depends on the config."""
        return self.keeps

    def sizes(self) -> tuple[int, int, int]:
        """A unit's inputs, states, and weights besides the recurrent ones."""
        raise NotImplementedError

    def start(self) -> tuple[float, ...]:
        """A unit's states before the first token; empty: zeros."""
        return ()

    def resolve(self, dim: int) -> Self:
        name, given = type(self).__name__, self.heads or self.head_dim
        heads, head_dim = head_sizes(name, dim, self.heads, self.head_dim, 0 if given else wide_head_dim(dim, name))
        if self.projection == "heads" and dim % heads:
            raise ValueError(f"{name}: heads {heads} do not divide dim {dim}, which projection 'heads' needs")
        return self.replace(heads=heads, head_dim=head_dim)

    @property
    def units(self) -> int:
        return self.heads * self.head_dim

    def inner(self) -> int:
        return self.units

    def groups(self) -> tuple[int, int]:
        """Heads and units per head as the recurrence sees them: all units are one head where it is dense."""
        return (1, self.units) if self.recurrence == "dense" else (self.heads, self.head_dim)

    def cell_weights(self, dim: int) -> Weights:
        """The input projection and the recurrence. Projected inputs are ordered (input, head, unit); a projection within
        heads has a matrix per head instead. What is one number per unit is a vector: it gets no weight decay."""
        units, (g, _, own), (heads, k) = self.units, self.sizes(), self.groups()
        xavier = Normal((2 / (g + units)) ** 0.5)  # of a matrix (inputs, units), as ParaRNN (arXiv 2510.21450)
        R = Weight("R", (g, heads, k, k), "blocks", Uniform(-(k**-0.5), k**-0.5))  # as torch.nn
        if self.recurrence == "diagonal":
            R = Weight("R", (g * units,), "vector", Uniform(-self.spread, self.spread) if self.spread else xavier)
        return (
            *self._input(dim, g),
            R,
            *((Weight("recurrent_bias", (g * units,), "bias", Constant(0.0)),) if self.recurrent_bias else ()),
            *((Weight("weights", (own * units,), "vector", xavier),) if own else ()),
        )

    def _input(self, dim: int, g: int) -> Weights:
        own = dim if self.projection == "dense" else dim // self.heads
        shape = (g * self.units, dim) if self.projection == "dense" else (self.heads, g * self.head_dim, own)
        weight = Weight("in_proj.weight", shape, "matrix" if len(shape) == 2 else "blocks", Normal(own**-0.5))
        if not self.bias:
            return (weight,)
        return weight, Weight("in_proj.bias", (g * self.units,), "bias", self._gate_start(g))

    def _gate_start(self, g: int) -> Start:
        """Biases are 0 but for those of the gate that keeps."""
        keeping = self.keeping()
        if keeping is None:
            return Constant(0.0)
        low, high = self.gate_bias if isinstance(self.gate_bias, tuple) else (self.gate_bias, self.gate_bias)
        gate, sign = keeping
        return Ramp(gate, g, self.head_dim, sign * low, sign * high)

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        own = reads or dim
        return (
            *(short_conv(own, self.conv_width, self.bias) if self.conv_width else ()),
            *(weight.inside("cell.") for weight in self.cell_weights(own)),
            *(projection("gate_proj", self.units, own) if self.output_gate else ()),
            *((norm("norm", self.units, plain=True),) if self.output_gate else ()),
            *self.output("out_proj", dim),
        )

    def state(self, dim: int, dtype: str) -> Memory:
        _, states, _ = self.sizes()
        channels = self.wrap.width(dim) if self.wrap else dim
        return recurrent((states, *self.groups()), self.conv_width or 1, channels, dtype, self.start())


class RNN(NonlinearRecurrence, frozen=True, kw_only=True, tag="rnn"):
    """Elman's network, h = tanh(x + m) or relu, as `torch.nn.RNN`; m is R h of the step before."""

    activation: Literal["tanh", "relu"] = "tanh"

    def sizes(self) -> tuple[int, int, int]:
        return 1, 1, 0


class GRU(NonlinearRecurrence, frozen=True, kw_only=True, tag="gru"):
    """GRU (arXiv 1406.1078), as `torch.nn.GRU` and, diagonal, ParaGRU (arXiv 2510.21450): h = (1 - z) h + z c."""

    keeps = (0, -1)  # z

    spread: float | None = 1.0

    def sizes(self) -> tuple[int, int, int]:
        return 3, 1, 0


class LSTM(NonlinearRecurrence, frozen=True, kw_only=True, tag="lstm"):
    """LSTM, as `torch.nn.LSTM`: c = f c + i z, h = o tanh(c). coupled: i = 1 - f. peephole: the gates also read c.

    With both it is ParaLSTM (arXiv 2510.21450).
    """

    keeps = (0, 1)  # f

    spread: float | None = 1.0
    coupled: bool = False
    peephole: bool = False

    def sizes(self) -> tuple[int, int, int]:
        gates = 3 if self.coupled else 4
        return gates, 2, (gates - 1) * self.peephole


class SLSTM(NonlinearRecurrence, frozen=True, kw_only=True, tag="slstm"):
    """sLSTM (arXiv 2405.04517): exponential input gate, normaliser, recurrence within heads."""

    keeps = (1, 1)  # f

    recurrence: Literal["diagonal", "heads", "dense"] = "heads"

    def sizes(self) -> tuple[int, int, int]:
        return 4, 3, 0

    def start(self) -> tuple[float, ...]:
        return 0.0, 0.0, EMPTY
