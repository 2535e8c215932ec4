"""Attention to nonlinear cells: values become candidates, and the output projection stays."""

from plait.convert.transfer.parts import heads_of, pass_through, put_output
from plait.design.layers import GRU, LSTM
from plait.layers.attention import AttentionLayer
from plait.layers.recurrent import RecurrentLayer

CANDIDATE = {GRU: "c", LSTM: "z"}


def to_cell(old: AttentionLayer, new: RecurrentLayer) -> None:
    """A unit of a cell is a channel of a head's values. Queries and keys have no place in it: what a token is to be read by is
    not a matter of contents here, and has to be learned."""
    heads = heads_of(old).spelled_out()
    pass_through(new.conv1d, 1.0)
    names = new.cell.cell.inputs
    rows = new.cell.in_proj.weight.data.unflatten(0, (len(names), -1))
    rows[names.index(CANDIDATE[type(new.config)])].copy_(heads.v.flatten(0, 1))
    put_output(new, heads.o)
