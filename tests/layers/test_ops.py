"""The ops that a layer says it runs are those that it runs."""

import pytest
import torch

import plait
from plait.design import load_design
from plait.design.layers import LETTERS
from plait.design.places import layers
from plait.layers.stack import LAYERS
from plait.ops.kernels import OPS, Call, kernels_of


@pytest.mark.parametrize("letter", LETTERS)
@torch.no_grad()
def test_declared_ops(letter):
    design = load_design(letter, dim=64, vocab=16)
    model = plait.build(design)
    (place,) = layers(design.slots)
    known = {op: kernels_of(op).known for op in OPS}
    for count, kind in ((1, "one"), (3, "few")):
        for choices in known.values():
            choices.clear()
        model(torch.zeros(1, count, dtype=torch.int64))
        called = {(op, facts[-1]) for op, choices in known.items() for facts, _ in choices}
        call = Call("cpu", torch.float32, kind)
        assert called == set(LAYERS[type(place.layer)].ops(place.layer, call))
