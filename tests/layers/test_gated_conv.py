"""LFM2's gated short convolution and the wraps of MiniMax-01, token by token in float64."""

import pytest
import torch

import plait
from plait.layers.context import context_for
from tests.ops.conftest import Close

close = Close()


@torch.no_grad()
@pytest.mark.parametrize(("conv_width", "bias"), [(3, False), (4, True), (1, False)])
def test_a_gated_convolution_is_its_definition(conv_width, bias):
    layer = plait.GatedConv(width=10, conv_width=conv_width, bias=bias)
    design = plait.ModelConfig(vocab=7, dim=16, pattern="C", layers={"C": layer})
    module, x = plait.build(design, dtype=torch.float64).place("C#0"), torch.randn(2, 9, 16, dtype=torch.float64)
    write, read, inner = module.in_proj(x).split(10, -1)
    product, filters = write * inner, module.conv1d.weight
    want = torch.zeros_like(product)
    for t in range(9):
        for i in range(min(conv_width, t + 1)):
            want[:, t] += filters[:, conv_width - 1 - i] * product[:, t - i]
    want = want if module.conv1d.bias is None else want + module.conv1d.bias
    close(module(x, context_for(x), None)[0], module.out_proj(read * want))


def test_a_gated_convolution_keeps_products_alone():
    design = plait.ModelConfig(vocab=7, dim=64, pattern="C", layers={"C": plait.GatedConv(width=10)})
    (spec,) = plait.build(design).state_spec(batch=1, length=1000).branches
    assert [tensor.shape for tensor in spec.tensors] == [(1, 2, 10)]


@torch.no_grad()
def test_added_to_the_normed_stream():
    wrap = plait.Wrap(keep=3.5, factor=0.5, residual="normed")
    design = plait.ModelConfig(vocab=7, dim=64, pattern="F", wrap=wrap, norm=plait.RMSNorm(eps=1e-4))
    slot, x = plait.build(design, dtype=torch.float64).slots[0], torch.randn(2, 5, 64, dtype=torch.float64)
    normed = torch.nn.functional.rms_norm(x, (64,), slot.norm.weight, 1e-4)
    close(slot(x, context_for(x), None)[0], 3.5 * normed + 0.5 * slot.mixer(normed, context_for(x), None)[0])


@pytest.mark.parametrize(
    ("wrap", "pattern", "message"),
    [
        ({"residual": "normed", "reads": "stream_and_embeddings"}, "F", "no stream to add to"),
        ({"keep": 2.0}, "[A|F]", "wrap.keep and wrap.residual are for slots"),
        ({"residual": "normed"}, "[A|F]", "wrap.keep and wrap.residual are for slots"),
    ],
)
def test_wraps_that_are_none(wrap, pattern, message):
    with pytest.raises(ValueError, match=message):
        plait.ModelConfig(vocab=7, dim=64, pattern=pattern, layers={"F": plait.SwiGLU(wrap=wrap)})
