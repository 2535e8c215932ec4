"""xLSTM as in xLSTM-7B: mLSTMs alone, which transformers has no others beside."""

from random import Random
from typing import Any

from plait.design.ends import Logits
from plait.design.layers import MLSTM, SwiGLU
from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.hub.families.family import Family, blocks, first
from plait.hub.families.fields import Fields
from plait.hub.weight_table import Rows

MIXER = {
    "norm": "norm_mlstm",
    "mixer.in_proj": (
        *(Rows(f"mlstm_layer.{part}", (part,)) for part in ("q", "k", "v")),
        Rows("mlstm_layer.ogate_preact", ("o",)),
    ),
    "mixer.gates_proj": "mlstm_layer.{part}gate_preact",
    "mixer.i_bias": "mlstm_layer.igate_preact.bias",
    "mixer.f_bias": "mlstm_layer.fgate_preact.bias",
    "mixer.norm": "mlstm_layer.multihead_norm",
    "mixer.out_proj": "mlstm_layer.out_proj",
}
SWIGLU = {
    "norm": "norm_ffn",
    "mixer.up_proj": (Rows("ffn.proj_up_gate", ("gate",)), Rows("ffn.proj_up", ("up",))),
    "mixer.down_proj": "ffn.proj_down",
}
HOW = (  # a result is computed, not what it is
    *("chunkwise_kernel", "sequence_kernel", "step_kernel", "mode", "chunk_size", "return_last_states"),
    *("autocast_kernel_dtype", "inference_state_dtype", "max_inference_chunksize", "norm_reduction_force_float32"),
)


def _design(f: Fields) -> ModelConfig:
    f.carried(*HOW, "add_out_norm")  # their model has that norm whatever this says
    # eps: beside a normaliser of at least exp(-15), of heads that are normed after it
    f.must(use_bias=False, weight_mode="single", tie_word_embeddings=False, eps=1e-6)
    dim, heads, count = f["hidden_size"], f["num_heads"], f["num_hidden_layers"]
    f.must(embedding_dim=dim, num_blocks=count)
    values, keys = (int(dim * f[name]) for name in ("v_dim_factor", "qk_dim_factor"))
    multiple = f["ffn_round_up_to_multiple_of"]
    hidden = int((dim * f["ffn_proj_factor"] + multiple - 1) // multiple * multiple)
    return ModelConfig(
        vocab=f["vocab_size"],
        dim=dim,
        pattern=f"(XF){count}",
        layers={
            "X": MLSTM(heads=heads, head_dim=values // heads, key_dim=keys // heads, cap=f["gate_soft_cap"]),
            "F": SwiGLU(hidden=hidden),
        },
        norm=RMSNorm(eps=f["norm_eps"]),
        head=Logits(softcap=f["output_logit_soft_cap"]),
        tie_embeddings=False,
    )


def _config(design: ModelConfig) -> dict[str, Any]:
    x, f, dim = first(design, MLSTM, "xlstm"), first(design, SwiGLU, "xlstm"), design.dim
    count = len(design.slots) // 2
    return {
        "vocab_size": design.vocab,
        "hidden_size": dim,
        "embedding_dim": dim,
        "num_hidden_layers": count,
        "num_blocks": count,
        "num_heads": x.heads,
        "v_dim_factor": _factor(x.inner(), dim),
        "qk_dim_factor": _factor(x.heads * x.key_dim, dim),
        "ffn_proj_factor": _factor(f.hidden, dim),
        "ffn_round_up_to_multiple_of": 1,
        "gate_soft_cap": x.cap,
        "norm_eps": design.norm.eps,
        "output_logit_soft_cap": design.head.softcap,
        "tie_word_embeddings": design.tied,
    }


def _factor(width: int, dim: int) -> float:
    """What dim times this is, rounded down, is the width."""
    return width / dim if int(dim * (width / dim)) == width else (width + 0.5) / dim


def _tiny(draw: Random) -> dict[str, Any]:
    heads = draw.choice([1, 2, 3])
    dim = heads * draw.choice([16, 20])
    return {
        "vocab_size": 97,
        "hidden_size": dim,
        "num_hidden_layers": draw.choice([2, 3]),
        "num_heads": heads,
        "qk_dim_factor": draw.choice([0.5, 1.0, 0.25]),
        "v_dim_factor": draw.choice([1.0, 0.5, 2.0]),
        "ffn_proj_factor": draw.choice([2.667, 1.3]),
        "ffn_round_up_to_multiple_of": draw.choice([64, 8]),
        "gate_soft_cap": draw.choice([15.0, 3.0]),
        "output_logit_soft_cap": draw.choice([30.0, 2.0]),
        "norm_eps": draw.choice([1e-5, 1e-6]),
        "chunk_size": draw.choice([64, 16]),
        "pad_token_id": None,
    }


FAMILIES = (
    Family(
        model_type="xlstm",
        architecture="xLSTMForCausalLM",
        design=_design,
        config=_config,
        slots=blocks(MIXER, SWIGLU, inside="backbone.blocks.{}."),
        tiny=_tiny,
        holds=(MLSTM, SwiGLU),
        ends={"embed": "backbone.embeddings", "norm": "backbone.out_norm", "lm_head": "lm_head"},
    ),
)
