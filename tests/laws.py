"""The laws of `plait.evaluate.laws` on the CPU. `plait selfcheck` runs the same functions on all designs."""

import pytest
import torch

from plait.design import (
    GRU,
    LSTM,
    RNN,
    SLSTM,
    Attention,
    Average,
    LayerNorm,
    Logits,
    Mamba2,
    MixtureOfExperts,
    Regression,
    SwiGLU,
    Tokens,
    Vectors,
    Wrap,
)
from plait.evaluate.laws import DESIGNS, EXACT, LAWS, packages, small
from plait.evaluate.laws.compare import some_tokens, subject
from plait.evaluate.laws.models import compiled, has_compiler, under_autocast
from plait.evaluate.selfcheck import FEW

CHECKED = [name for name in LAWS if name != "compiled"]

# Mistakes show in float64. float32 is run for faults of its own, digits too few in a layer's sums, which no composition of
# layers can add: so only on the designs of a layer or two. Laws without a tolerance count and compare bits in any dtype.
RUNS = [
    pytest.param(law, dtype, design, id=f"{law}-{str(dtype)[6:]}-{name}")
    for law in CHECKED
    for dtype in (torch.float32, torch.float64)
    for name, design in DESIGNS.items()
    if name not in ("((GF)3 AF)2", "((SF)3 AF)2")  # repeated as ((DF)3 AF)2 is, and as slow as they are deep
    and (dtype == torch.float64 or (law not in EXACT and len(design.places()) <= FEW))
]


@pytest.mark.parametrize(("law", "dtype", "design"), RUNS)
def test_law(law, dtype, design):
    LAWS[law](design, "cpu", dtype)


# Tracing takes seconds a layer, and does not care about digits, sizes or neighbours: here every mixer, merge, wrap, front and
# head once, several to a design; `plait selfcheck` compiles all designs.
COMPILED = {
    "layers, merges, norms, factors": small(
        "Grouped [M|DF] [Soft|Gd]:gated [Hc|Sd]:merge_attention [N|F]:projection",
        M=Mamba2(heads=6, head_dim=10, state_dim=14, groups=3, conv_bias=False, conv_width=6),
        Soft=Attention(heads=4, kv_heads=2, head_dim=16, softcap=2.0, window=5),
        Gd=GRU(heads=1, head_dim=20, recurrence="dense", recurrent_bias=True),
        Hc=LSTM(heads=2, head_dim=13, coupled=True, peephole=True, clip=0.2),
        N=RNN(heads=4, head_dim=9, activation="relu", conv_width=None, output_gate=False),
        Sd=SLSTM(heads=4, head_dim=7, recurrence="diagonal", projection="heads", gate_bias=1.0),
        wrap=Wrap(norms="after", factor=0.22),
        at={
            "Grouped#0": {"wrap": {"norms": "both", "norm": {"kind": "layer_norm", "bias": False}}},
            "F#0": {"wrap": {"norms": "none", "factor": 0.5}},
            "par#0": {"wrap": {"norms": "before"}, "merge": {"kind": "sum", "weights": [0.7, 1.3]}},
        },
    ),
    "shared layers with additions of their own, values of the first layer, reading the embeddings too": small(
        "(AZ)2 [W|F] F",
        A=Attention(heads=2, kv_heads=1, head_dim=20, shared=True, adapter_rank=2),
        Z=SwiGLU(hidden=96, shared=True, adapter_rank=3),
        W=Attention(heads=2, kv_heads=1, head_dim=20, window=7),
        wrap=Wrap(value_residual=True),
        at={"F#1": {"wrap": {"reads": "stream_and_embeddings"}}},
    ),
    "scalar decays and experts": small(
        "RnX LiSg CE",
        E=MixtureOfExperts(experts=6, top_k=2, hidden=20, groups=3, top_groups=2, shared_hidden=28, bias_rate=1e-3),
        at={"Li#0": {"wrap": {"keep": 1.3, "residual": "normed"}}},
    ),
    "layer norms, biases, a front and a head with everything": small(
        "AF",
        norm=LayerNorm(eps=1e-4),
        front=Tokens(scale=8.0, norm=True, positions=300, meta=3),
        head=Logits(bias=True, scale=0.5, softcap=3.0),
        A=Attention(heads=4, head_dim=12, rope=None, bias=("q", "v")),
    ),
    "frames to frames, heads merged": small(
        "[A|W]",
        vocab=None,
        front=Vectors(features=7, norm=True),
        head=Regression(outputs=7),
        merge=Average(at="inner"),
        A=Attention(heads=4, head_dim=12),
        W=Attention(heads=2, head_dim=24, window=7),
    ),
}


@pytest.mark.parametrize("design", COMPILED.values(), ids=COMPILED)
def test_compiles_as_one_graph(design):
    compiled(design, "cpu", torch.float32)


@pytest.mark.skipif(not has_compiler(), reason="inductor needs a C++ compiler")
def test_trains_as_code_under_autocast():
    """Inductor refuses some of what tracing accepts, such as products of mixed dtypes. A second of C++ for each kernel."""
    design = small("D")
    model, tokens = subject(design, "cpu", torch.float32), some_tokens(design, 70, "cpu")[None]
    under_autocast("compiled", model, torch.compile(model, fullgraph=True), tokens)
    torch.compiler.reset()


def test_kernel_packages_without_a_gpu_are_left_alone():
    packages(list(COMPILED.values()))
