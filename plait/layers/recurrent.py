"""Layers of nonlinear recurrences: RNN, GRU, LSTM, sLSTM, and cells of one's own."""

from dataclasses import fields
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers.recurrent import GRU, LSTM, RNN, SLSTM, NonlinearRecurrence
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm, inner
from plait.layers.context import Context
from plait.layers.declared import DeclaredModule, HeadProjection, MixerModule
from plait.layers.norm import GatedNorm
from plait.layers.short_conv import ShortConv
from plait.layers.start import start
from plait.ops.frame import Rows
from plait.ops.kernels import Call
from plait.ops.packing import Packing
from plait.ops.shooting import Bound, Cell, Info, NotConverged, Sizes, cells, shooting, torch_rnn
from plait.state import Recurrent, recurrent

CELLS: dict[type[NonlinearRecurrence], type[Cell]] = {
    RNN: cells.RNN,
    GRU: cells.GRU,
    LSTM: cells.LSTM,
    SLSTM: cells.SLSTM,
}


def cell_of(config: NonlinearRecurrence) -> Cell:
    """The cell that a config speaks of."""
    return cell_with(CELLS[type(config)], config)


def cell_with(kind: Any, config: NonlinearRecurrence) -> Cell:
    """A cell of this kind; its fields are among the config's."""
    return kind(**{field.name: getattr(config, field.name) for field in fields(kind)})


class RecurrentCell(DeclaredModule):
    """Input projection and recurrence: x (b, t, dim) -> h (b, t, units), weights drawn from `seed`."""

    in_proj: nn.Linear | HeadProjection
    R: nn.Parameter
    recurrent_bias: nn.Parameter | None
    weights: nn.Parameter | None

    def __init__(self, config: NonlinearRecurrence, dim: int, seed: int = 0):
        super().__init__()
        self.config = config = config.resolve(dim)
        self.cell, self.reads = cell_of(config), dim
        declared = config.cell_weights(dim)
        self.declare(declared, RMSNorm())
        for name in {"recurrent_bias", "weights"} - {weight.name for weight in declared}:
            self.register_parameter(name, None)
        if self.R.device.type != "meta":
            start(self, declared, seed)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        s: Float[Tensor, "n s h k"] | None = None,
        packing: Packing | None = None,
        rows: Rows | None = None,
    ) -> tuple[Float[Tensor, "b t u"], Float[Tensor, "n s h k"] | None, Info]:
        """h, the states after the last token where states were given, and how the solver record."""
        c = self.config
        h, s, info = shooting(
            self.bound(),
            self.project(x),
            state=s,
            packing=packing,
            rows=rows,
            tol=c.tol,
            max_passes=c.max_passes,
            strict=c.strict,
            solver=c.solver,
        )
        return h.flatten(2), s, info

    def project(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t g h k"]:
        """What each unit reads."""
        b, t, _ = x.shape
        g, (heads, k) = len(self.cell.inputs), self.config.groups()
        if not isinstance(self.in_proj, HeadProjection):
            return self.in_proj(x).view(b, t, g, heads, k)
        y = self.in_proj(x, g)
        return y if y.shape[3] == heads else y.reshape(b, t, g, heads, k)

    def bound(self) -> Bound:
        """The cell with its weights, as `shooting` takes it."""
        g, (heads, k) = len(self.cell.inputs), self.config.groups()
        R, weights = self.R, ()
        if self.config.recurrence == "diagonal":
            R = R.view(g, heads, k)
        if self.weights is not None:
            weights = self._clipped(self.weights).view(-1, heads, k).unbind(0)
        bias = None if self.recurrent_bias is None else self.recurrent_bias.view(g, heads, k)
        return self.cell.bind(self._clipped(R), bias=bias, weights=weights)

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
        theirs = {name: _rows(CELLS[kind], weight.detach()) for name, weight in module.named_parameters()}
        like = theirs["weight_ih_l0"]
        cell = cls(config, module.input_size).to(like.device, like.dtype)
        names = {
            "in_proj.weight": "weight_ih",
            "R": "weight_hh",
            "in_proj.bias": "bias_ih",
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


def _rows(cell: type[Cell], weight: Tensor) -> Tensor:
    """torch's rows in the order of our inputs. Its GRU's z is 1 - z here, sigmoid(-a) for sigmoid(a)."""
    order, signs = torch_rnn.ORDER[cell]
    parts = weight.chunk(len(order))
    return torch.cat([signs[order.index(i)] * parts[order.index(i)] for i in range(len(order))])


class RecurrentLayer(MixerModule):
    """The cell between a short convolution and a gated norm, as in ParaRNN (arXiv 2510.21450) and Mamba-2."""

    config: NonlinearRecurrence
    conv1d: ShortConv | None
    gate_proj: nn.Linear | None
    norm: GatedNorm | None

    @classmethod
    def ops(cls, config: NonlinearRecurrence, call: Call) -> list[tuple[str, Sizes | None]]:
        own = len(cell_of(config).weights)
        sizes = Sizes(CELLS[type(config)], config.recurrence == "diagonal", config.recurrent_bias, own, config.solver)
        return [*([("conv", None)] if config.conv_width else []), ("shooting", sizes)]

    def __init__(self, config: NonlinearRecurrence, design: ModelConfig):
        super().__init__(config, design)
        if not config.conv_width:
            self.conv1d = None
        if not config.output_gate:
            self.gate_proj = None

    def assemble(self, design: ModelConfig) -> None:
        self.cell = RecurrentCell(self.config, self.reads(design) or design.dim)
        self.norm = GatedNorm(self.config.units, inner(design.norm).eps) if self.config.output_gate else None

    def inner(
        self, x: Float[Tensor, "b t d"], context: Context, state: Recurrent | None
    ) -> tuple[Float[Tensor, "b t d"], Recurrent | None]:
        u, conv = x, state and state.conv
        if self.conv1d is not None:
            u, conv = self.conv1d(x, context, conv)
        solve = self._strictly if self.cell.config.strict else self._solve
        h, s, info = solve(u, context, state)
        context.stat("solver", info, "max")
        if self.norm is not None and self.gate_proj is not None:
            h = self.norm(h, self.gate_proj(x))
        return h, recurrent(s, conv)

    def _solve(self, u: Tensor, context: Context, state: Recurrent | None) -> tuple[Tensor, Tensor | None, Info]:
        return self.cell(u, state and state.s, context.packing, context.rows)

    def _strictly(self, u: Tensor, context: Context, state: Recurrent | None) -> tuple[Tensor, Tensor | None, Info]:
        try:  # in a method of its own: where a graph breaks inside a try, torch.compile gives up the whole function
            return self._solve(u, context, state)
        except NotConverged as error:
            raise NotConverged(f"{context.path}: {error}") from None
