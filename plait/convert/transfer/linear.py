"""Attention to linear recurrences: queries, keys, values and output go where a recurrence reads, writes and gives them out.

Every query head gets a state of its own; keys and values of a group are spelled out. What attention has none of, decays,
strengths and gates, starts as drawn but where a function here says otherwise.
"""

from plait.convert.transfer.parts import fill, heads_of, pass_through, put_output
from plait.layers.attention import AttentionLayer
from plait.layers.deltanet import DeltaNetLayer
from plait.layers.gated_deltanet import GatedDeltaNetLayer
from plait.layers.gla import GLALayer
from plait.layers.kimi_delta import KimiDeltaAttentionLayer
from plait.layers.mamba2 import Mamba2Layer
from plait.layers.mlstm import MLSTMLayer
from plait.layers.scalar_decay import ScalarDecayLayer

TAP = 0.1


def to_delta(old: AttentionLayer, new: GatedDeltaNetLayer | DeltaNetLayer | KimiDeltaAttentionLayer) -> None:
    _carry(old, new)
    pass_through(new.conv1d, TAP)


def to_kimi_delta(old: AttentionLayer, new: KimiDeltaAttentionLayer) -> None:
    to_delta(old, new)


def to_gla(old: AttentionLayer, new: GLALayer) -> None:
    _carry(old, new)


def to_scalar_decay(old: AttentionLayer, new: ScalarDecayLayer) -> None:
    _carry(old, new)


def to_mlstm(old: AttentionLayer, new: MLSTMLayer) -> None:
    _carry(old, new)


def to_mamba2(old: AttentionLayer, new: Mamba2Layer) -> None:
    """v to x, k to B, q to C (Zebra-Llama, MambaInLlama arXiv 2408.15237), every query head with a B and C of its own."""
    _carry(old, new, q="C", k="B", v="x")
    pass_through(new.conv1d, TAP)


def _carry(old: AttentionLayer, new, q: str = "q", k: str = "k", v: str = "v") -> None:
    heads = heads_of(old).spelled_out()
    fill(new.in_proj, {q: heads.q.flatten(0, 1), k: heads.k.flatten(0, 1), v: heads.v.flatten(0, 1)})
    put_output(new, heads.o)
