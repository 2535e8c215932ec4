"""Published models as presets: plait/design/published.json, and the table in docs/presets.md.

    python benchmarks/published.py

A model is a family of transformers and the fields of its published config that differ from the class's defaults, as the model
cards and config files give them; what `plait.hub.families` reads of it is the preset. Two systems without public code are
written as designs (facts and sources in docs/presets.md). `total` and `active` are the counts that their authors publish, in
billions, without multi-token prediction.
"""

import json
from pathlib import Path
from typing import Any

from plait.design import ModelConfig
from plait.design.count import active_parameters, parameters
from plait.design.summary import si
from plait.hub.checkpoint import design_of
from plait.hub.families import family

ROOT = Path(__file__).parent.parent
DATA, PAGE = ROOT / "plait" / "design" / "published.json", ROOT / "docs" / "presets.md"
MARK = "<!-- presets: made by benchmarks/published.py -->\n"
NEAR = 0.02  # of the published count

LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500_000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}


def theta(value: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value, **more}}


def sizes(dim: int, layers: int, heads: int, kv_heads: int, hidden: int, **more: Any) -> dict[str, Any]:
    shape = {"hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": hidden}
    return {**shape, "num_key_value_heads": kv_heads, **more}


def llama3(factor: float) -> dict[str, Any]:
    rope = {"rope_parameters": {**LLAMA3, "factor": factor}, "max_position_embeddings": 131_072}
    return {**rope, "rms_norm_eps": 1e-5, "vocab_size": 128_256}


# name: (family, fields, total, active where a token passes some alone)
MODELS: dict[str, tuple[str, dict[str, Any], float, float | None]] = {
    "llama-3.2-1b": (
        "llama",
        sizes(2048, 16, 32, 8, 8192, head_dim=64, tie_word_embeddings=True, **llama3(32.0)),
        1.236,
        None,
    ),
    "llama-3.2-3b": (
        "llama",
        sizes(3072, 28, 24, 8, 8192, head_dim=128, tie_word_embeddings=True, **llama3(32.0)),
        3.213,
        None,
    ),
    "llama-3.1-8b": ("llama", sizes(4096, 32, 32, 8, 14336, **llama3(8.0)), 8.030, None),
    "smollm2-135m": (
        "llama",
        sizes(576, 30, 9, 3, 1536, vocab_size=49152, tie_word_embeddings=True, rms_norm_eps=1e-5, **theta(100_000.0)),
        0.1345,
        None,
    ),
    "smollm3-3b": ("smollm3", sizes(2048, 36, 16, 4, 11008, vocab_size=128_256, **theta(5e6)), 3.075, None),
    "mistral-7b-v0.3": (
        "mistral",
        sizes(4096, 32, 32, 8, 14336, vocab_size=32768, sliding_window=None, rms_norm_eps=1e-5, **theta(1e6)),
        7.248,
        None,
    ),
    "qwen2.5-0.5b": ("qwen2", sizes(896, 24, 14, 2, 4864, tie_word_embeddings=True, **theta(1e6)), 0.494, None),
    "qwen2.5-7b": ("qwen2", sizes(3584, 28, 28, 4, 18944, vocab_size=152_064, **theta(1e6)), 7.616, None),
    "qwen3-0.6b": ("qwen3", sizes(1024, 28, 16, 8, 3072, tie_word_embeddings=True, **theta(1e6)), 0.596, None),
    "qwen3-8b": ("qwen3", sizes(4096, 36, 32, 8, 12288, **theta(1e6)), 8.191, None),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        sizes(2048, 48, 32, 4, 6144, head_dim=128, num_experts=128, norm_topk_prob=True, **theta(1e6)),
        30.53,
        3.35,
    ),
    "gemma-2-2b": ("gemma2", {}, 2.614, None),
    "gemma-3-1b": (
        "gemma3_text",
        sizes(1152, 26, 4, 1, 6912, head_dim=256, vocab_size=262_144, sliding_window=512, query_pre_attn_scalar=256),
        1.000,
        None,
    ),
    "olmo-2-7b": (
        "olmo2",
        sizes(4096, 32, 32, 32, 11008, vocab_size=100_352, rms_norm_eps=1e-6, **theta(500_000.0)),
        7.299,
        None,
    ),
    "phi-3-mini": ("phi3", {}, 3.821, None),
    "deepseek-v2-lite": (
        "deepseek_v2",
        sizes(
            2048,
            27,
            16,
            16,
            10944,
            q_lora_rank=None,
            moe_intermediate_size=1408,
            num_experts_per_tok=6,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
        ),
        15.71,
        2.4,
    ),
    "deepseek-v3": ("deepseek_v3", {}, 671.0, 37.0),
    "mamba-130m": ("mamba", {"num_hidden_layers": 24}, 0.129, None),
    "mamba-2.8b": ("mamba", {"num_hidden_layers": 64, "hidden_size": 2560, "time_step_rank": 160}, 2.768, None),
    "mamba2-2.7b": (
        "mamba2",
        {"hidden_size": 2560, "num_heads": 80, "n_groups": 1, "vocab_size": 50_288, "tie_word_embeddings": True},
        2.703,
        None,
    ),
    "codestral-mamba-7b": ("mamba2", {}, 7.285, None),
    "falcon-h1-0.5b": (
        "falcon_h1",
        sizes(
            1024,
            36,
            8,
            2,
            2048,
            head_dim=64,
            vocab_size=32_784,
            mamba_d_ssm=1536,
            mamba_n_heads=24,
            mamba_d_head=64,
            mamba_d_state=128,
            mamba_norm_before_gate=False,
            **theta(1e11),
        ),
        0.521,
        None,
    ),
    "bamba-9b": ("bamba", {"attn_layer_indices": [9, 18, 27]}, 9.78, None),
    "jamba-v0.1": ("jamba", {}, 51.57, 12.1),
    "granite-4.0-h-tiny": (
        "granitemoehybrid",
        sizes(
            1536,
            40,
            12,
            4,
            512,
            vocab_size=100_352,
            tie_word_embeddings=True,
            num_local_experts=64,
            num_experts_per_tok=6,
            shared_intermediate_size=1024,
            mamba_n_heads=48,
            mamba_d_head=64,
            mamba_d_state=128,
            rms_norm_eps=1e-5,
            layer_types=["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
            attention_multiplier=0.0078125,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            logits_scaling=6.0,
            position_embedding_type="nope",
        ),
        6.94,
        1.0,
    ),
    "zamba2-2.7b": ("zamba2", {"num_mem_blocks": 2}, 2.69, None),
    "lfm2-1.2b": (
        "lfm2",
        sizes(
            2048,
            16,
            32,
            8,
            12288,
            layer_types=["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)],
        ),
        1.170,
        None,
    ),
    "recurrentgemma-2b": ("recurrent_gemma", {"num_key_value_heads": 1, "intermediate_size": 15_360}, 2.683, None),
    "xlstm-7b": ("xlstm", {}, 6.865, None),
    "minimax-text-01": (
        "minimax",
        sizes(
            6144,
            80,
            64,
            8,
            9216,
            head_dim=128,
            vocab_size=200_064,
            num_local_experts=32,
            layer_types=["full_attention" if i % 8 == 7 else "linear_attention" for i in range(80)],
        ),
        456.0,
        45.9,
    ),
    "qwen3-next-80b-a3b": ("qwen3_next", theta(1e7, partial_rotary_factor=0.25), 79.7, 3.9),
    "qwen3.5-9b": ("qwen3_5_text", theta(1e7, partial_rotary_factor=0.25), 9.0, None),
    "qwen3.5-35b-a3b": ("qwen3_5_moe_text", theta(1e7, partial_rotary_factor=0.25), 35.0, 3.0),
    "olmo-hybrid-7b": ("olmo_hybrid", {}, 7.4, None),
    "kimi-linear-48b-a3b": ("kimi_linear", {}, 48.0, 3.0),
}


def read(name: str) -> ModelConfig:
    family_name, fields, _, _ = MODELS[name]
    found = family(family_name)
    return design_of(found, {"model_type": found.model_type, **fields}, name)


def zebra(
    base: str, pattern: str, heads: int, head_dim: int, rope_dim: int, rank: int, query_rank: int, factor: float
) -> Any:
    """Llama's body; latent attention in some blocks and Mamba-2, a group for each head, in the others."""
    body = read(base).to_dict()
    rope = {"theta": 500_000.0, "scaling": {"kind": "yarn", "factor": factor, "original": 8192}}
    latent = {
        "heads": heads,
        "nope_dim": head_dim - rope_dim,
        "rope_dim": rope_dim,
        "value_dim": head_dim,
        "rank": rank,
    }
    mamba2 = {"heads": heads, "head_dim": head_dim, "state_dim": head_dim, "groups": heads}
    layers = {
        "L": {"kind": "latent_attention", **latent, "query_rank": query_rank, "rope": rope},
        "M": {"kind": "mamba2", **mamba2},
        "F": body["layers"]["F"],
    }
    return {**body, "pattern": pattern, "layers": layers}


def hunyuan(
    dim: int, heads: int, kv_heads: int, head_dim: int, groups: int, hidden: int, vocab: int, pattern: str
) -> Any:
    """Two of 32 experts and a shared one after each mixer."""
    experts = {"kind": "moe", "experts": 32, "top_k": 2, "hidden": hidden, "shared_hidden": hidden}
    return {
        **{"vocab": vocab, "dim": dim, "pattern": pattern},
        "layers": {
            "A": {"kind": "attention", "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "qk_norm": True},
            "M": {"kind": "mamba2", "heads": heads, "head_dim": 64, "groups": groups},
            "E": experts,
        },
    }


# as designs: what is written down nowhere else. The counts of Zebra-Llama are not published beyond their names.
DESIGNS: dict[str, tuple[Any, float | None, float | None]] = {
    "hunyuan-turbos": (hunyuan(5120, 64, 8, 128, 16, 17_024, 128_000, "((ME)4 AE (ME)4)7 ME"), 560.0, 56.0),
    "hunyuan-turbos-mini": (hunyuan(256, 4, 2, 64, 2, 256, 4096, "(ME)2 AE (ME)2"), None, None),
    "zebra-llama-1b": (
        zebra("llama-3.2-1b", "LF (MF)4 LF (MF)4 LF (MF)3 LF MF", 32, 64, 32, 128, 1344, 32.0),
        None,
        None,
    ),
    "zebra-llama-3b": (
        zebra("llama-3.2-3b", "(LF (MF)4)2 LF (MF)5 (LF (MF)4)2 LF MF", 24, 128, 64, 128, 1536, 32.0),
        None,
        None,
    ),
    "zebra-llama-8b": (zebra("llama-3.1-8b", "(LF (MF)3)5 (LF (MF)4)2 LF MF", 32, 128, 64, 160, 2048, 8.0), None, None),
}


def row(name: str, source: str, design: ModelConfig, total: float | None, active: float | None) -> str:
    own, passed = parameters(design), active_parameters(design)
    counts = si(own) if own == passed else f"{si(own)} ({si(passed)})"
    published = "" if total is None else f"{total:g}B" + ("" if active is None else f" ({active:g}B)")
    apart = [x / (y * 1e9) - 1 for x, y in ((own, total), (passed, active)) if y is not None]
    far = ", ".join(f"{x:+.1%}" for x in apart)
    return f"| `{name}` | {source} | `{design.pattern}` | {counts} | {published} | {far} |"


def main() -> None:
    models = {name: (read(name).to_dict(), MODELS[name][0], *MODELS[name][2:]) for name in MODELS}
    models |= {name: (data, "design", total, active) for name, (data, total, active) in DESIGNS.items()}
    rows = ["| preset | family | pattern | parameters (active) | published | apart |", "|---|---|---|---|---|---|"]
    for name, (data, source, total, active) in models.items():
        rows.append(row(name, source, ModelConfig.from_dict(data), total, active))
    DATA.write_text(json.dumps({name: data for name, (data, *_) in models.items()}, indent=1) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
    PAGE.write_text(f"{before}{MARK}\n" + "\n".join(rows) + f"\n\n{rest[rest.index('## ') :]}", encoding="utf-8")


if __name__ == "__main__":
    main()
