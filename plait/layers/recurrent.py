"""Layers of nonlinear recurrences: RNN, GRU, LSTM, sLSTM, and cells of one's own."""

from dataclasses import fields
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import told
from plait.design.model import ModelConfig
from plait.design.recurrent import GRU, LSTM, RNN, SLSTM, Recurrent
from plait.layers.context import Context
from plait.layers.mamba2 import reset_conv
from plait.layers.norm import Norm
from plait.ops.conv import causal_conv
from plait.ops.packing import Packing
from plait.ops.shooting import Bound, Cell, Info, NotConverged, cells, shooting
from plait.state import Recurrent as State
from plait.state import recurrent

CELLS: dict[type[Recurrent], type[Cell]] = {RNN: cells.RNN, GRU: cells.GRU, LSTM: cells.LSTM, SLSTM: cells.SLSTM}


def cell_of(config: Recurrent) -> Cell:
    """The cell that a config speaks of."""
    return made(CELLS[type(config)], config)


def made(kind: Any, config: Recurrent) -> Cell:
    """A cell of this kind; its fields are among the config's."""
    return kind(**{field.name: getattr(config, field.name) for field in fields(kind)})


class RecurrentCell(nn.Module):
    """Input projection and recurrence: x (b, t, dim) -> h (b, t, units).

    Projected inputs are ordered (input, head, unit); a projection within heads has a matrix per head instead. What is one
    number per unit is a vector: it gets no weight decay.
    """

    def __init__(self, config: Recurrent, dim: int):
        super().__init__()
        self.config = config = config.resolve(dim)
        self.cell = cell_of(config)
        heads, k, units = told(config.heads), told(config.head_dim), config.units()
        g, _, weights = config.sizes()
        self.in_proj = nn.Linear(dim, g * units, bias=False) if config.projection == "dense" else None
        self.in_heads = None if self.in_proj is not None else nn.Parameter(torch.empty(heads, g * k, dim // heads))
        self.bias = nn.Parameter(torch.empty(g * units)) if config.bias else None
        self.recurrent_bias = nn.Parameter(torch.empty(g * units)) if config.recurrent_bias else None
        wide, size = config.groups()
        shape = (g * units,) if config.recurrence == "diagonal" else (g, wide, size, size)
        self.recurrent = nn.Parameter(torch.empty(shape))
        self.weights = nn.Parameter(torch.empty(weights * units)) if weights else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections N(0, 1/fan_in). Numbers per unit as ParaRNN (arXiv 2510.21450), Xavier's normal of a matrix (inputs,
        units); matrices as torch.nn, uniform in +-1/sqrt(k). Biases 0 but for the gate that keeps."""
        c = self.config
        g, units = c.sizes()[0], c.units()
        weight = self.in_heads if self.in_proj is None else self.in_proj.weight
        assert weight is not None
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        if c.recurrence == "diagonal" and c.spread is not None:
            nn.init.uniform_(self.recurrent, -c.spread, c.spread)
        elif c.recurrence == "diagonal":
            nn.init.normal_(self.recurrent, std=(2 / (g + units)) ** 0.5)
        else:
            bound = self.recurrent.shape[-1] ** -0.5
            nn.init.uniform_(self.recurrent, -bound, bound)
        if self.weights is not None:
            nn.init.normal_(self.weights, std=(2 / (g + units)) ** 0.5)
        for bias in (self.bias, self.recurrent_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        if c.keeps is not None and self.bias is not None:
            low, high = c.gate_bias if isinstance(c.gate_bias, tuple) else (c.gate_bias, c.gate_bias)
            name, sign = c.keeps
            gate = self.bias.data.view(g, -1, told(c.head_dim))[self.cell.inputs.index(name)]
            gate.copy_(sign * torch.linspace(low, high, told(c.head_dim)))

    def forward(
        self, x: Float[Tensor, "b t d"], s: Float[Tensor, "n s h k"] | None = None, packing: Packing | None = None
    ) -> tuple[Float[Tensor, "b t u"], Float[Tensor, "n s h k"] | None, Info]:
        """h, the states after the last token where states were given, and how the solver fared."""
        c = self.config
        h, final, info = shooting(
            self.bound(),
            self.project(x),
            s,
            packing=packing,
            tol=c.tol,
            max_passes=c.max_passes,
            strict=c.strict,
            solver=c.solver,
        )
        return h.flatten(2), None if s is None else final, info

    def project(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t g h k"]:
        """What each unit reads. Within heads it is one product per head, and seen in this order without a copy."""
        b, t, _ = x.shape
        g, (heads, k) = len(self.cell.inputs), self.config.groups()
        if self.in_proj is not None:
            return F.linear(x, self.in_proj.weight, self.bias).view(b, t, g, heads, k)
        assert self.in_heads is not None
        h, rows, own = self.in_heads.shape
        parts, weight = x.reshape(b * t, h, own).transpose(0, 1), self.in_heads.mT
        if self.bias is None:
            y = torch.bmm(parts, weight)  # (h, b t, g k)
        else:
            bias = self.bias.view(g, h, -1).transpose(0, 1).reshape(h, 1, rows)
            y = torch.baddbmm(bias, parts, weight)
        y = y.view(h, b, t, g, -1).permute(1, 2, 3, 0, 4)
        return y if h == heads else y.reshape(b, t, g, heads, k)

    def bound(self) -> Bound:
        """The cell with its weights, as `shooting` takes it."""
        g, (heads, k) = len(self.cell.inputs), self.config.groups()
        recurrent, weights = self.recurrent, ()
        if self.config.recurrence == "diagonal":
            recurrent = recurrent.view(g, heads, k)
        if self.weights is not None:
            weights = self._clipped(self.weights).view(-1, heads, k).unbind(0)
        bias = None if self.recurrent_bias is None else self.recurrent_bias.view(g, heads, k)
        return self.cell.bind(self._clipped(recurrent), bias=bias, weights=weights)

    def _clipped(self, weight: Tensor) -> Tensor:
        clip = self.config.clip
        return weight if clip is None else weight.clamp(-clip, clip)

    @classmethod
    def from_torch(cls, module: nn.RNN | nn.GRU | nn.LSTM) -> Self:
        """The same cell from torch.nn: one layer, one direction. It takes (b, t, dim) whatever the module's batch_first."""
        _check_torch(module)
        bias = bool(module.bias)
        kind = {nn.RNN: RNN, nn.GRU: GRU, nn.LSTM: LSTM}[type(module)]
        own = {"activation": module.nonlinearity} if isinstance(module, nn.RNN) else {}
        config = kind(heads=1, head_dim=module.hidden_size, recurrence="dense", bias=bias, recurrent_bias=bias, **own)
        theirs = {name: _rows(module, weight.detach()) for name, weight in module.named_parameters()}
        like = theirs["weight_ih_l0"]
        cell = cls(config, module.input_size).to(like.device, like.dtype)
        names = {
            "in_proj.weight": "weight_ih",
            "recurrent": "weight_hh",
            "bias": "bias_ih",
            "recurrent_bias": "bias_hh",
        }
        for name, parameter in cell.named_parameters():
            parameter.data.copy_(theirs[f"{names[name]}_l0"].view_as(parameter))
        return cell


def _check_torch(module: nn.Module) -> None:
    if type(module) not in (nn.RNN, nn.GRU, nn.LSTM):
        raise TypeError(f"from_torch takes a torch.nn.RNN, GRU or LSTM, got {type(module).__name__}")
    assert isinstance(module, nn.RNNBase)
    for wrong, what in (
        (module.num_layers != 1, f"num_layers {module.num_layers}; convert one layer at a time"),
        (module.bidirectional, "bidirectional; a causal model reads in one direction"),
        (module.proj_size != 0, f"proj_size {module.proj_size}; plait's LSTM gives its units themselves"),
    ):
        if wrong:
            raise ValueError(f"from_torch: unsupported {what}")


def _rows(module: nn.Module, weight: Tensor) -> Tensor:
    """torch's rows in the order of our inputs. Its GRU's z is 1 - z here, sigmoid(-a) for sigmoid(a)."""
    if isinstance(module, nn.GRU):
        r, z, n = weight.chunk(3)
        return torch.cat([-z, r, n])
    if isinstance(module, nn.LSTM):
        i, f, z, o = weight.chunk(4)
        return torch.cat([f, z, o, i])
    return weight


class RecurrentLayer(nn.Module):
    """The cell between a short convolution and a gated norm, as in ParaRNN (arXiv 2510.21450) and Mamba-2."""

    def __init__(self, config: Recurrent, design: ModelConfig):
        super().__init__()
        dim, units, width = design.dim, config.units(), config.conv_width
        self.conv1d_weight = nn.Parameter(torch.empty(dim, width)) if width else None
        self.conv1d_bias = nn.Parameter(torch.empty(dim)) if width and config.bias else None
        self.cell = RecurrentCell(config, dim)
        self.gate_proj = nn.Linear(dim, units, bias=False) if config.output_gate else None
        self.norm = Norm(units, design.norm.replace(zero_centered=False)) if config.output_gate else None
        self.out_proj = nn.Linear(units, dim, bias=False)
        if self.conv1d_weight is not None:
            reset_conv(self.conv1d_weight, self.conv1d_bias)

    def forward(
        self, x: Float[Tensor, "b t d"], context: Context, state: State | None
    ) -> tuple[Float[Tensor, "b t d"], State | None]:
        u, conv = x, state and state.conv
        if self.conv1d_weight is not None:
            u, conv = causal_conv(x, self.conv1d_weight, self.conv1d_bias, state=conv, packing=context.packing)
            u = F.silu(u)
        solve = self._strictly if self.cell.config.strict else self._solve
        h, s, info = solve(u, context, state)
        context.report("solver", info)
        if self.norm is not None and self.gate_proj is not None:
            h = self.norm(h) * F.silu(self.gate_proj(x))
        return self.out_proj(h), recurrent(s, conv)

    def _solve(self, u: Tensor, context: Context, state: State | None) -> tuple[Tensor, Tensor | None, Info]:
        return self.cell(u, state and state.s, context.packing)

    def _strictly(self, u: Tensor, context: Context, state: State | None) -> tuple[Tensor, Tensor | None, Info]:
        try:  # in a method of its own: where a graph breaks inside a try, torch.compile gives up the whole function
            return self._solve(u, context, state)
        except NotConverged as error:
            raise NotConverged(f"{context.path}: {error}") from None
