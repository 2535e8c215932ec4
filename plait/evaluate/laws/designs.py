"""The designs that the laws are checked on: between them every layer with every option, every merge, every nesting."""

from typing import Any

from plait.design import (
    GEGLU,
    GELU,
    GLA,
    GRU,
    HGRN,
    HGRN2,
    LSTM,
    MLSTM,
    RGLRU,
    RNN,
    RWKV7,
    SLSTM,
    Attention,
    Average,
    DeltaNet,
    Gated,
    GatedConv,
    GatedDeltaNet,
    KimiDeltaAttention,
    LatentAttention,
    LayerNorm,
    LightningAttention,
    Linear,
    Logits,
    Mamba,
    Mamba2,
    MergeAttention,
    MinGRU,
    MinLSTM,
    MixtureOfExperts,
    ModelConfig,
    Projection,
    Regression,
    ReLU2,
    RetNet,
    RMSNorm,
    RoPE,
    RWKV7FeedForward,
    SimpleGLA,
    Sum,
    SwiGLU,
    Tokens,
    Vectors,
    Wrap,
)
from plait.design.ends import Front, Head
from plait.design.layers import Layer
from plait.design.merges import Merge
from plait.design.norms import Norm

# small enough that a law takes moments, and no two sizes alike, so that no axis can be taken for another
LAYERS: dict[str, Layer] = {
    "A": Attention(heads=4, head_dim=12),
    "W": Attention(heads=2, head_dim=20, window=7),
    "L": LatentAttention(heads=3, nope_dim=10, rope_dim=6, value_dim=14, rank=22),
    "M": Mamba2(heads=6, head_dim=10, state_dim=14),
    "D": GatedDeltaNet(heads=2, head_dim=18, value_heads=4, value_head_dim=22),
    "X": MLSTM(heads=3, head_dim=14, key_dim=10),
    "Rn": RetNet(heads=3, head_dim=10, value_head_dim=14),
    "Li": LightningAttention(heads=3, head_dim=12, value_head_dim=10, slope=0.7),
    "Sg": SimpleGLA(heads=4, head_dim=9, value_head_dim=11),
    "G": GRU(heads=2, head_dim=15),
    "H": LSTM(heads=2, head_dim=13),
    "S": SLSTM(heads=2, head_dim=11),
    "Gl": GLA(heads=3, head_dim=6, value_head_dim=10, gate_rank=5),
    "Ht": HGRN2(heads=3, state_dim=7, head_dim=9),
    "Dn": DeltaNet(heads=3, head_dim=6, value_head_dim=8, conv_width=3),
    "K": KimiDeltaAttention(heads=3, head_dim=6, value_head_dim=8, rank=5),
    "Rw": RWKV7(heads=3, head_dim=10, decay_rank=4, strength_rank=5, value_rank=6, gate_rank=7),
    "Rf": RWKV7FeedForward(hidden=80),
    "C": GatedConv(width=22),
    "P": Linear(),
    "F": SwiGLU(hidden=96),
    "E": MixtureOfExperts(experts=5, top_k=2, hidden=24),
    "Grouped": Attention(heads=4, kv_heads=2, head_dim=16, qk_norm=True, output_gate=True, rope=RoPE(fraction=0.25)),
    "Shared": GatedDeltaNet(heads=2, head_dim=18, shared=True),
}


def small(
    pattern: str,
    *,
    merge: Merge | None = None,
    tied: bool = True,
    centred: bool = False,
    wrap: Wrap = Wrap(),  # noqa: B008 (frozen)
    at: dict[str, Any] | None = None,
    merges: dict[str, Merge] | None = None,
    norm: Norm | None = None,
    front: Front = Tokens(),  # noqa: B008
    head: Head = Logits(),  # noqa: B008
    vocab: int | None = 61,
    **layers: Layer,
) -> ModelConfig:
    """A design of width 64 over 61 tokens.

    Norms have 1e-4 where the default is 1e-6: what a delta rule says of a first token is near zero, and normed as it is
    would blow up float32's rounding until it hides mistakes.
    """
    return ModelConfig(
        **({} if vocab is None else {"vocab": vocab}),
        dim=64,
        pattern=pattern,
        layers=LAYERS | layers,
        merge=merge or Average(),
        merges=merges or {},
        norm=norm or RMSNorm(eps=1e-4, zero_centered=centred),
        wrap=wrap,
        at=at or {},
        front=front,
        head=head,
        tie_embeddings=tied,
    )


DESIGNS: dict[str, ModelConfig] = {
    "defaults": ModelConfig(vocab=61, dim=64, pattern="[M|A]F DF WF"),
    "AF": small("AF"),
    "MF": small("MF"),
    "DF": small("DF"),
    "WF": small("WF"),
    "AF grouped, q/k norm, gate, partial RoPE": small("(GroupedF)2"),
    "AF one key head, no RoPE, biases": small(
        "AF", A=Attention(heads=4, kv_heads=1, head_dim=12, rope=None, bias=True), F=SwiGLU(hidden=32, bias=True)
    ),
    "AF soft-capped": small("AF", A=Attention(heads=2, head_dim=16, softcap=2.0)),
    "WF soft-capped, grouped": small("WF", W=Attention(heads=4, kv_heads=2, head_dim=16, softcap=2.0, window=5)),
    "WF window of one": small("WDF", W=Attention(heads=2, head_dim=16, window=1)),
    "SinksF, in full and in a window": small(
        "SinksF NearF",
        Sinks=Attention(heads=4, kv_heads=2, head_dim=12, sinks=True, bias=("q", "k", "v")),
        Near=Attention(heads=2, head_dim=20, window=7, sinks=True),
    ),
    "WF with a prefix, and values of the first layer": small(
        "WF NearF",
        wrap=Wrap(value_residual=True),
        W=Attention(heads=4, kv_heads=2, head_dim=12, window=7, prefix=3),
        Near=Attention(heads=6, kv_heads=2, head_dim=12, window=5, prefix=9, sinks=True, softcap=2.0),
    ),
    "A AF L, positions scaled, a temperature": small(
        "A AF L",
        A=Attention(heads=3, head_dim=12, rope=RoPE(scaling={"kind": "yarn", "factor": 4.0, "original": 16})),
        at={
            "A#1": {"rope": None, "temperature": {"scale": 0.3, "every": 5}},
            "L#0": {"rope": {"theta": 500.0, "scaling": {"kind": "llama3", "original": 20}}},
        },
    ),
    "LF": small("LF"),
    "LF without positions, queries from a latent": small(
        "LF LF",
        L=LatentAttention(heads=2, nope_dim=12, rope_dim=4, value_dim=9, rank=17, query_rank=26, rope=None),
        at={"L#1": {"rope": RoPE(), "rank": 5, "latent_norm": False}, "L#0": {"norm_eps": 1e-3}},
    ),
    "MF groups, no bias, wide convolution": small(
        "MF", M=Mamba2(heads=6, head_dim=10, state_dim=14, groups=3, conv_bias=False, conv_width=6)
    ),
    "MF, norm before the gate, steps within limits, biases, multipliers": small(
        "MF M",
        M=Mamba2(heads=6, head_dim=10, state_dim=14, groups=2, output_norm="norm_first", in_bias=True, out_bias=True),
        at={
            "M#0": {"dt_min": 0.01, "dt_max": 0.05, "multipliers": [0.5, 2.0, 0.3, 1.5, 0.7]},
            "M#1": {"dt_min": 0.02, "output_norm": "none"},
        },
    ),
    "DF plain heads, convolution of two": small(
        "DF", D=GatedDeltaNet(heads=3, head_dim=16, conv_width=2, norm_eps=1e-3)
    ),
    "GlF": small("GlF"),
    "KF": small("KF"),
    "Rw2 Rf": small("Rw2 Rf", at={"Rw#0": {"value_residual": False, "norm_eps": 1e-3, "removal_eps": 1e-2}}),
    "CF": small("CF"),
    "CF biases, a filter of five; [C|A]": small("CF [C|A]", C=GatedConv(width=18, conv_width=5, bias=True)),
    "DnF": small("DnF"),
    "HtF": small("HtF"),
    "HtF, a bound that is given": small("HtF", Ht=HGRN2(heads=2, state_dim=8, head_dim=5, lower_bound=0.3)),
    "DF KF, positions": small("DF KF", at={"D#0": {"rope": {"fraction": 0.5}}, "K#0": {"rope": {}}}),
    "Gl Dn Li Sg, positions": small(
        "Gl Dn Li Sg F", at={name: {"rope": {"theta": 100.0}} for name in ("Gl#0", "Dn#0", "Li#0", "Sg#0")}
    ),
    "DF, negative eigenvalues": small("DF", D=GatedDeltaNet(heads=2, head_dim=6, negative_eigenvalues=True)),
    "[K|Dn]F, negative eigenvalues": small(
        "[K|Dn]F",
        K=KimiDeltaAttention(heads=2, head_dim=7, negative_eigenvalues=True),
        Dn=DeltaNet(heads=2, head_dim=5, negative_eigenvalues=True),
    ),
    "GF": small("GF"),
    "HF": small("HF"),
    "SF": small("SF"),
    "HF coupled, peepholes, clipped": small("HF", H=LSTM(heads=2, head_dim=13, coupled=True, peephole=True, clip=0.2)),
    "HF peepholes, dense": small("HF", H=LSTM(heads=3, head_dim=5, peephole=True, recurrence="dense")),
    "SF diagonal, head-wise projection": small(
        "SF", S=SLSTM(heads=4, head_dim=7, recurrence="diagonal", projection="heads", gate_bias=1.0)
    ),
    "SF large heads": small("SF", S=SLSTM(heads=2, head_dim=24, conv_width=2, gate_bias=(3.0, 6.0))),
    "GF dense, two biases": small("GF", G=GRU(heads=1, head_dim=20, recurrence="dense", recurrent_bias=True)),
    "GF heads, head-wise projection, no biases": small(
        "GF", G=GRU(heads=4, head_dim=6, recurrence="heads", projection="heads", bias=False)
    ),
    "MaF": small("MaF", Ma=Mamba(inner_dim=22, state_dim=6, dt_rank=5)),
    "MaF norms, convolution of two; [Ma|A]": small(
        "MaF [Ma|A]", Ma=Mamba(inner_dim=18, state_dim=3, dt_rank=4, norms=True, conv_width=2, conv_bias=False)
    ),
    "RF": small("RF", R=RGLRU(heads=3, head_dim=14)),
    "RF one head, convolution of two": small("RF", R=RGLRU(heads=1, head_dim=20, conv_width=2)),
    "HgF MgF MlF": small(
        "HgF MgF Ml", Hg=HGRN(width=26), Mg=MinGRU(width=22, bias=False), Ml=MinLSTM(width=18, conv_width=None)
    ),
    "Hg without a lower bound, convolution; Mg; [R|Ml]": small(
        "Hg Mg [R|Ml]F", Hg=HGRN(width=30, lower_bound=None, conv_width=3, bias=True), R=RGLRU(heads=2, head_dim=9)
    ),
    "NF and XF, bare": small(
        "NF XF",
        N=RNN(heads=4, head_dim=9, recurrence="heads", conv_width=None, output_gate=False),
        X=RNN(heads=4, head_dim=9, activation="relu", projection="heads", conv_width=None),
    ),
    "GELU, ReLU2 and GEGLU": small("AF DR U", F=GELU(hidden=80, bias=True), R=ReLU2(hidden=72), U=GEGLU(hidden=56)),
    "XF": small("XF"),
    "RnF LiF": small("RnF LiF"),
    "LiE, added to the normed stream, each with a factor": small(
        "LiE AE", wrap=Wrap(keep=1.3, factor=0.7, residual="normed"), at={"Li#0": {"norm_eps": 1e-3}}
    ),
    "SgF": small("SgF"),
    "AE": small("AE"),
    "ME experts in groups, chosen with a bias, sigmoids, a gated shared expert": small(
        "M E",
        E=MixtureOfExperts(
            experts=12,
            top_k=3,
            hidden=20,
            router="sigmoid",
            scale=2.5,
            groups=4,
            top_groups=2,
            shared_hidden=28,
            shared_gate=True,
            bias_rate=1e-3,
        ),
    ),
    "ME experts without gates on a latent, relu2": small(
        "M E",
        E=MixtureOfExperts(experts=5, top_k=2, hidden=20, activation="relu2", latent_dim=12, shared_hidden=28),
    ),
    "zero-centred norms, untied": small("DF GroupedF", centred=True, tied=False),
    "shared layers": small("(SharedF)2 [Shared|A]", F=SwiGLU(hidden=96, shared=True)),
    "((DF)3 AF)2": small("((DF)3 AF)2"),
    "((GF)3 AF)2": small("((GF)3 AF)2"),
    "((SF)3 AF)2": small("((SF)3 AF)2"),
    "[M|A]F": small("[M|A]F"),
    "[H|A]F": small("[H|A]F"),
    "[M|A]:sum F": small("[M|A]:sum F", merge=Sum(branch_norm=False)),
    "[MF|A]:gated F": small("[MF|A]:gated F"),
    "[A|M|D]:projection F": small("[A|M|D]:projection F"),
    "[M|D]:merge_attention F": small("[M|D]:merge_attention F"),
    "[M|A|D]:hymba [G|W]:joined F": small(
        "[M|A|D]:hymba [G|W]:joined F",
        merges={"hymba": Average(at="inner"), "joined": Projection(at="inner", branch_norm=False)},
        M=Mamba2(heads=3, head_dim=16, state_dim=12),
        A=Attention(heads=4, kv_heads=2, head_dim=12),
        D=GatedDeltaNet(heads=2, head_dim=10, value_head_dim=24),
    ),
    "[M[A|D]:sum|W]F": small("[M[A|D]:sum|W]F"),
    "[WF|DAF]:average [A|[M|D]:gated]": small("[WF|DAF]:average [A|[M|D]:gated]", merge=Projection(branch_norm=False)),
    "norms after, both, none; factors": small(
        "AF DF [M|GF]F",
        wrap=Wrap(norms="after", factor=0.22),
        at={
            "D#0": {"wrap": {"norms": "both", "norm": {"kind": "layer_norm", "bias": False}}},
            "F#1": {"wrap": {"norms": "none", "factor": 0.5}},
            "par#0": {"wrap": {"norms": "before"}, "merge": {"kind": "sum", "weights": [0.7, 1.3]}},
        },
    ),
    "layer norms, learned positions, a scaled and normed front, biases": small(
        "AF MF",
        norm=LayerNorm(eps=1e-4),
        front=Tokens(scale=8.0, norm=True, positions=300),
        head=Logits(bias=True, scale=0.5, softcap=3.0),
        A=Attention(heads=4, head_dim=12, rope=None, bias=("q", "v")),
    ),
    "reading the embeddings too, values of the first layer": small(
        "AF AW DF GA",
        wrap=Wrap(value_residual=True),
        A=Attention(heads=2, kv_heads=1, head_dim=20),
        W=Attention(heads=2, kv_heads=1, head_dim=20, window=7),
        at={
            "D#0": {"wrap": {"reads": "stream_and_embeddings"}},
            "G#0": {"wrap": {"reads": "stream_and_embeddings"}},
            "F#0": {"wrap": {"reads": "stream_and_embeddings", "norms": "none"}},
        },
    ),
    "meta tokens": small("AF WF DF Gl", front=Tokens(meta=3), W=Attention(heads=2, head_dim=20, window=5, prefix=3)),
    "meta tokens and learned positions, own head with bias": small(
        "MF A", front=Tokens(meta=2, positions=300), head=Logits(bias=True), tied=False
    ),
    "shared layers with additions of their own": small(
        "(SharedF)2 [Shared|A]",
        F=SwiGLU(hidden=96, shared=True, adapter_rank=3),
        Shared=GatedDeltaNet(heads=2, head_dim=18, shared=True, adapter_rank=2),
    ),
    "a shared block that feeds the slot behind it, some of it adapted": small(
        "M BUPM BUPM D",
        B=Attention(
            heads=4,
            kv_heads=2,
            head_dim=12,
            shared=True,
            adapter_rank=3,
            adapted=("q", "v"),
            wrap=Wrap(reads="stream_and_embeddings", gives="next"),
        ),
        U=GEGLU(hidden=40, exact=True, shared=True, adapter_rank=2, adapted=("up_proj",), wrap=Wrap(gives="next")),
        P=Linear(bias=True, wrap=Wrap(norms="none", gives="next_added")),
    ),
    "merges by name, layers by address": small(
        "[M|A]:soft [D|W]:hard (AF)2",
        merges={"soft": Gated(), "hard": Gated(branch_norm=False)},
        at={
            "A#1": {"heads": 2, "scale": 0.2},
            "F#1": {"hidden": 40},
            "A#2": {"kind": "gru", "heads": 3, "head_dim": 7},
        },
    ),
    "frames to classes": small("DF [A|G]F", vocab=10, front=Vectors(features=7)),
    "frames to frames": small("MF W", vocab=None, front=Vectors(features=7, norm=True), head=Regression(outputs=7)),
    "[A|DM] F, branches not normed": small("[A|DM] F", merge=MergeAttention(branch_norm=False)),
}
