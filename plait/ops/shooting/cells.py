"""Recurrent cells: what one step does to one unit, and how units hear of each other.

A cell's `step` treats every unit alone. Units speak to each other, if at all, through the recurrence m = R h_{t-1} + b
that is added to (or, in a GRU, gated into) the inputs; `Bound` holds R as a vector, a matrix per head, or one matrix.
Solvers get the Jacobian from these two parts: the step's own partial derivatives, elementwise, and R.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from plait.design.layers.recurrent import EMPTY as EMPTY
from plait.ops.kernels import cast

Parts = tuple[Tensor, ...]

KNOWN: dict[str, "Cell"] = {}  # operators take text, so a cell goes in by its name


class Cell:
    """Subclass, name what a unit reads and keeps, and write `step`. Instances are plain values: frozen dataclasses.

    inputs: the numbers that the projection of the layer's input gives each unit; the recurrence gives as many.
    states: the numbers a unit keeps; the first is its output h, which the recurrence reads.
    weights: further learned numbers per unit, such as peepholes. start: the states before the first token.
    """

    inputs: ClassVar[tuple[str, ...]] = ("x",)
    states: ClassVar[tuple[str, ...]] = ("h",)
    weights: tuple[str, ...] = ()
    key: str  # tells this cell and its options from every other, and a class from one of its name before it

    def __new__(cls, *args: Any, **values: Any) -> Self:
        """Known before its class's own constructor runs, whatever that does: torch.compile could not enter it later."""
        cell = super().__new__(cls)
        cell.__dict__["key"] = key = f"{cls.__module__}.{cls.__qualname__}{args}{values}@{id(cls):x}"
        KNOWN[key] = cell
        return cell

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, in another process too, is constructed, and so known there."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init} if is_dataclass(self) else {}
        return partial(type(self), **values), ()

    @property
    def start(self) -> tuple[float, ...]:
        return (0.0,) * len(self.states)

    def start_like(self, like: Tensor, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """(rows, s, h, k) before the first token, on the device and of the units of `like` (*, h, k), and in its dtype
        unless told otherwise."""
        first, *others = self.start
        start = like.new_full((rows, len(self.start), *like.shape[-2:]), first, dtype=dtype)
        for i, value in enumerate(others, 1):
            if value != first:
                start[:, i] = value
        return start

    def step(self, x: Parts, m: Parts, s: Parts, w: Parts) -> Parts:
        """New states from inputs x, recurrence m and states s, a tensor per name, any shape; elementwise and smooth."""
        raise NotImplementedError(f"{type(self).__name__} has no step(self, x, m, s, w)")

    def advance(self, x: Float[Tensor, "n g h k"], bound: "Bound", s: Parts, into: Float[Tensor, "n s h k"]) -> Parts:
        """A token outside autograd, its inputs and new states in one piece each, for cells that can use that."""
        parts = self.step(x.unbind(1), bound.mix(s[0]).unbind(1), s, bound.weights)
        torch.stack(parts, 1, out=into)
        return parts

    def bind(self, recurrent: Tensor, *, bias: Tensor | None = None, weights: Parts = ()) -> "Bound":
        """The cell with its numbers, as `shooting` takes it."""
        return Bound(self, recurrent, bias, tuple(weights))


@dataclass(frozen=True, eq=False)
class Bound:
    """A cell with weights. `recurrent`: (g, h, k) for one number per unit, or (g, h, k, k) for a matrix per head, rows
    out, so that a dense recurrence is one head. `bias` (g, h, k) is added to the recurrence; `weights` are (h, k)."""

    cell: Cell
    recurrent: Float[Tensor, "g h k *k"]
    bias: Float[Tensor, "g h k"] | None = None
    weights: Parts = field(default=())

    def __post_init__(self) -> None:
        g, name = len(self.cell.inputs), type(self.cell).__name__
        if self.recurrent.ndim not in (3, 4) or self.recurrent.shape[0] != g:
            raise ValueError(
                f"{name}: recurrent weights must be ({g}, heads, k) or ({g}, heads, k, k), "
                f"got {tuple(self.recurrent.shape)}"
            )
        if len(self.weights) != len(self.cell.weights):
            raise ValueError(f"{name} needs the weights {self.cell.weights}, got {len(self.weights)} tensors")

    @property
    def diagonal(self) -> bool:
        return self.recurrent.ndim == 3

    def tensors(self) -> list[Tensor]:
        """Everything learned, in one order."""
        return [self.recurrent, *([] if self.bias is None else [self.bias]), *self.weights]

    def with_tensors(self, tensors: list[Tensor]) -> "Bound":
        """The same cell with other numbers, in the order of `tensors`."""
        bias = None if self.bias is None else tensors[1]
        return Bound(self.cell, tensors[0], bias, tuple(tensors[1 + (bias is not None) :]))

    def to(self, dtype: torch.dtype) -> "Bound":
        return self.with_tensors([cast(w, dtype) for w in self.tensors()])

    def mix(self, h: Float[Tensor, "*n h k"]) -> Float[Tensor, "*n g h k"]:
        """m = R h + b."""
        if self.diagonal:
            m = self.recurrent * h.unsqueeze(-3)
        else:
            g, heads, k, _ = self.recurrent.shape
            rows = h.reshape(-1, heads, k).transpose(0, 1)  # (h, n, k)
            columns = self.recurrent.permute(1, 3, 0, 2).reshape(heads, k, g * k)
            m = torch.bmm(rows, columns).view(heads, -1, g, k).permute(1, 2, 0, 3).reshape(*h.shape[:-2], g, heads, k)
        return m if self.bias is None else m + self.bias

    def mix_into(self, x: Float[Tensor, "*n g h k"], h: Float[Tensor, "*n h k"]) -> Float[Tensor, "*n g h k"]:
        """x + m."""
        if self.diagonal and self.bias is None:
            return torch.addcmul(x, self.recurrent, h.unsqueeze(-3))
        return x + self.mix(h)

    def unmix(self, r: Float[Tensor, "n g h k"]) -> Float[Tensor, "n h k"]:
        """R^T r."""
        if self.diagonal:
            return (self.recurrent * r).sum(1)
        g, heads, k, _ = self.recurrent.shape
        rows = self.recurrent.transpose(0, 1).reshape(heads, g * k, k)
        return torch.bmm(r.permute(2, 0, 1, 3).reshape(heads, -1, g * k), rows).transpose(0, 1)

    def step(self, x: Float[Tensor, "*n g h k"], s: Float[Tensor, "*n s h k"]) -> Float[Tensor, "*n s h k"]:
        """One token."""
        m = self.mix(s.select(-3, 0))
        return torch.stack(self.cell.step(x.unbind(-3), m.unbind(-3), s.unbind(-3), self.weights), -3)


@dataclass(frozen=True)
class RNN(Cell):
    """Elman's network (Cognitive Science 14, 1990), as `torch.nn.RNN`: h = tanh(x + m), or relu."""

    activation: Literal["tanh", "relu"] = "tanh"

    def step(self, x: Parts, m: Parts, s: Parts, w: Parts) -> Parts:
        return (torch.tanh(x[0] + m[0]) if self.activation == "tanh" else torch.relu(x[0] + m[0]),)


@dataclass(frozen=True)
class GRU(Cell):
    """arXiv 1406.1078 with the reset after the product, as `torch.nn.GRU` (its z is 1 - z here) and ParaGRU (arXiv
    2510.21450): z, r = sigmoid(x + m), c = tanh(x_c + r m_c), h = (1 - z) h + z c."""

    inputs = ("z", "r", "c")

    def step(self, x: Parts, m: Parts, s: Parts, w: Parts) -> Parts:
        z, r = torch.sigmoid(x[0] + m[0]), torch.sigmoid(x[1] + m[1])
        c = torch.tanh(x[2] + r * m[2])
        return (s[0] + z * (c - s[0]),)


@dataclass(frozen=True)
class LSTM(Cell):
    """Neural Computation 9(8), 1997, as `torch.nn.LSTM`: c = f c + i z, h = o tanh(c).

    coupled: i = 1 - f. peephole: the gates also read the cell, f and i the old one, o the new one. With both it is ParaLSTM
    (arXiv 2510.21450, section 4).
    """

    coupled: bool = False
    peephole: bool = False
    states = ("h", "c")

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on `coupled`
        return ("f", "z", "o") if self.coupled else ("f", "z", "o", "i")

    @property
    def weights(self) -> tuple[str, ...]:  # type: ignore[override]
        if not self.peephole:
            return ()
        return ("p_f", "p_o") if self.coupled else ("p_f", "p_o", "p_i")

    def step(self, x: Parts, m: Parts, s: Parts, w: Parts) -> Parts:
        f, z, o = x[0] + m[0], torch.tanh(x[1] + m[1]), x[2] + m[2]
        if self.peephole:
            f = torch.addcmul(f, w[0], s[1])
        f = torch.sigmoid(f)
        if self.coupled:
            c = z + f * (s[1] - z)
        else:
            i = x[3] + m[3]
            c = f * s[1] + torch.sigmoid(torch.addcmul(i, w[2], s[1]) if self.peephole else i) * z
        o = torch.sigmoid(torch.addcmul(o, w[1], c) if self.peephole else o)
        return o * torch.tanh(c), c

    def advance(self, x: Float[Tensor, "n g h k"], bound: "Bound", s: Parts, into: Float[Tensor, "n s h k"]) -> Parts:
        """All gates in one call, tanh(z) as 2 sigmoid(2 z) - 1: on a CPU a few large operations, over all its cores, take
        half the time of many small ones."""
        if self.peephole or self.coupled:
            return super().advance(x, bound, s, into)
        gates = bound.mix_into(x, s[0])
        gates[:, 1].mul_(2)
        f, z, o, i = gates.sigmoid_().unbind(1)
        h, c = into.unbind(1)
        torch.addcmul(torch.addcmul(-i, f, s[1]), i, z, value=2, out=c)
        torch.mul(o, torch.tanh(c), out=h)
        return h, c


@dataclass(frozen=True)
class SLSTM(Cell):
    """sLSTM (arXiv 2405.04517, section 2.2): exponential input gate, normaliser and stabiliser.

    The paper keeps c, n and a stabiliser m that cancels out of h = o c / n. Kept here are what is left of them: the
    quotient q = c / n and l = log n + m, smooth and never out of range. With u = l + log sigmoid(f):
    q = w q + (1 - w) tanh(z), w = sigmoid(u - i), l = log(exp(u) + exp(i)), h = sigmoid(o) q.
    """

    inputs = ("i", "f", "z", "o")
    states = ("h", "q", "l")

    @property
    def start(self) -> tuple[float, ...]:
        return (0.0, 0.0, EMPTY)

    def step(self, x: Parts, m: Parts, s: Parts, w: Parts) -> Parts:
        i, f, z, o = (a + b for a, b in zip(x, m, strict=True))
        u = s[2] + F.logsigmoid(f)
        z = torch.tanh(z)
        q = z + torch.sigmoid(u - i) * (s[1] - z)
        return torch.sigmoid(o) * q, q, torch.logaddexp(u, i)
