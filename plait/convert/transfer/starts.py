"""How gates and decays of each recurrent layer are set: open to one degree for all tokens, forgetting at one rate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from plait.convert.transfer.parts import fill
from plait.design.layers import (
    GLA,
    GRU,
    LSTM,
    MLSTM,
    DeltaNet,
    GatedDeltaNet,
    KimiDeltaAttention,
    LatentAttention,
    Layer,
    LightningAttention,
    Mamba2,
    RetNet,
    SimpleGLA,
)

Direction = Float[Tensor, " d"]  # u, for which u . x is nearly 1 in all tokens
Rates = Float[Tensor, " h"]  # -log of what a state is multiplied by, a token


class Start(NamedTuple):
    """gates: opened along u, nothing of what depends on the token. forget: at a rate a head; None: the kind has its own."""

    gates: Callable[[Any, Direction], None]
    forget: Callable[[Any, Rates], None] | None = None


def _rows(new: Any, u: Direction, gate: str | None, still: tuple[str, ...]) -> None:
    """A silu gate's rows along u; rows of what is to be the same for all tokens at zero."""
    sizes = dict(new.in_proj.parts)
    along = {gate: u.expand(sizes[gate], -1)} if gate else {}
    fill(new.in_proj, along | {name: u.new_zeros(sizes[name], len(u)) for name in still})


def _by_step(new: Any, rates: Rates) -> None:
    """A head forgets at exp(A_log) softplus(dt_bias)."""
    step = F.softplus(new.dt_bias.double()).view(len(rates), -1)[:, 0]
    new.A_log.data.copy_((rates / step).log())


def _open_mamba2(new: Any, u: Direction) -> None:
    _rows(new, u, "z", ("dt",))
    new.D.data.zero_()  # a query reads its own token through the state already


def _open_kimi(new: Any, u: Direction) -> None:
    """All channels of a head forget at one rate, as of gated DeltaNet: spread as drawn, they keep less of attention."""
    _rows(new, u, None, ("b",))
    new.dt_bias.data.fill_(1.0)
    new.decay_proj.weight.data.zero_()
    new.gate_proj.weight.data.zero_()  # a sigmoid: half open


def _open_gla(new: Any, u: Direction) -> None:
    _rows(new, u, "z", ())
    new.decay_proj.weight.data.zero_()


def _open_mlstm(new: Any, u: Direction) -> None:
    _rows(new, u, None, ("o",))
    new.gates_proj.weight.data.zero_()


def _open_cell(new: Any, u: Direction) -> None:
    """Candidates are those of the token alone, and gates the same for all."""
    if new.gate_proj is not None:
        new.gate_proj.weight.data.copy_(u.expand_as(new.gate_proj.weight))
    new.cell.R.data.zero_()


def _logit(rates: Rates) -> Float[Tensor, " h"]:
    """What a sigmoid turns into exp(-rate)."""
    return -torch.log(torch.expm1(rates))


def _forget_cell(new: Any, rates: Rates) -> None:
    """By the bias of the gate that keeps; rows of all gates are zero."""
    c, names = new.config, new.cell.cell.inputs
    gate, sign = c.keeping()
    candidate = "c" if isinstance(c, GRU) else "z"
    weight = new.cell.in_proj.weight.data.unflatten(0, (len(names), -1))
    for i, name in enumerate(names):
        if name != candidate:
            weight[i] = 0
    if new.cell.in_proj.bias is not None:
        bias = new.cell.in_proj.bias.data.unflatten(0, (len(names), c.heads, -1))
        bias[gate] = (sign * _logit(rates))[:, None]


def _gla_bias(new: Any, rates: Rates) -> None:
    bias = new.decay_proj.bias.data
    bias.copy_(_logit(rates * new.config.temper).repeat_interleave(len(bias) // len(rates)))


STARTS: dict[type[Layer], Start] = {
    LatentAttention: Start(lambda new, u: None),
    GatedDeltaNet: Start(lambda new, u: _rows(new, u, "z", ("a", "b")), _by_step),
    DeltaNet: Start(lambda new, u: _rows(new, u, None, ("b",))),
    KimiDeltaAttention: Start(_open_kimi, _by_step),
    Mamba2: Start(_open_mamba2, _by_step),
    GLA: Start(_open_gla, _gla_bias),
    SimpleGLA: Start(
        lambda new, u: _rows(new, u, "gate", ("g",)),
        lambda new, rates: new.g_bias.data.copy_(_logit(rates * new.config.temper)),
    ),
    LightningAttention: Start(lambda new, u: _rows(new, u, None, ("gate",))),
    RetNet: Start(lambda new, u: _rows(new, u, "gate", ())),
    MLSTM: Start(_open_mlstm, lambda new, rates: new.f_bias.data.copy_(_logit(rates))),
    GRU: Start(_open_cell, _forget_cell),
    LSTM: Start(_open_cell, _forget_cell),
}
