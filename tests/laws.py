"""The laws of `plait.evaluate.laws` on all its designs, on the CPU. `plait selfcheck` runs the same functions."""

import pytest
import torch

from plait.evaluate.laws import DESIGNS, EXACT, LAWS, packages
from plait.evaluate.laws.models import compiled, has_compiler

CHECKED = [name for name in LAWS if name != "compiled"]


# laws without a tolerance count and compare bits: what they find does not depend on the dtype they are run in
RUNS = [
    (law, dtype) for law in CHECKED for dtype in ((torch.float64,) if law in EXACT else (torch.float32, torch.float64))
]


@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
@pytest.mark.parametrize(("law", "dtype"), RUNS, ids=[f"{law}-{str(dtype)[6:]}" for law, dtype in RUNS])
def test_law(law, dtype, design):
    LAWS[law](design, "cpu", dtype)


# Tracing takes seconds a design, and does not care about digits or sizes: here every layer, merge, wrap, front and head once;
# `plait selfcheck` compiles all designs.
COMPILED = (
    *(
        "AF grouped, q/k norm, gate, partial RoPE",
        "WF soft-capped, grouped",
        "MF groups, no bias, wide convolution",
        "DF",
    ),
    *("GF", "HF coupled, peepholes, clipped", "SF diagonal, head-wise projection", "GF dense, two biases"),
    *("[MF|A]:gated F", "[M|D]:merge_attention F"),
    *("norms after, both, none; factors", "layer norms, learned positions, a scaled and normed front, biases"),
    *("reading the embeddings too, values of the first layer", "meta tokens", "frames to frames"),
    "shared layers with additions of their own",
)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph(name):
    compiled(DESIGNS[name], "cpu", torch.float32)


@pytest.mark.skipif(not has_compiler(), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["AF", "DF"])
def test_compiles_to_code(name):
    compiled(DESIGNS[name], "cpu", torch.float32, backend="inductor")


def test_kernel_packages_without_a_gpu_are_left_alone():
    packages(list(DESIGNS.values()))
