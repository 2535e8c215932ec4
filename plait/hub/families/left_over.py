"""Fields that published configs hold and no class of transformers reads.

They stem from a model's first code, its trainer or other libraries. What transformers computes does not depend on them,
whatever they say; a field that is neither here nor read is an error, as it may come from a newer version.
"""

from collections.abc import Mapping
from typing import Any

ANY = (
    "_from_model_config",
    "transformers.js_config",
    "unsloth_fixed",
    "unsloth_version",
    "_attn_implementation_autoset",
    "attn_implementation",
)
OF = {
    "llama": ("is_llama_config", "rope_interleaved", "use_sliding_window", "max_window_layers"),
    "mistral": ("use_sliding_window", "max_window_layers"),
    "qwen2": ("use_mrope",),
    "smollm3": ("max_window_layers",),
    "mamba": ("d_inner", "d_model", "fused_add_norm", "n_layer", "pad_vocab_size_multiple", "rms_norm", "ssm_cfg"),
    "mamba2": ("intermediate_size", "norm_before_gate", "rms_norm", "time_step_init_scheme", "time_step_scale"),
    "falcon_h1": (
        *("mamba_use_mlp", "mlp_expansion_factor", "time_step_floor", "time_step_max", "time_step_min"),
        "time_step_rank",
    ),
    "jamba": ("calc_logits_for_entire_prompt", "mamba_inner_layernorms", "n_ctx", "num_logits_to_keep"),
    "zamba2": ("ffn_hidden_size", "use_shared_mlp_adapter"),
    "bamba": ("attn_rotary_emb",),
    "nemotron_h": (
        *(
            "attention_head_dim",
            "norm_eps",
            "rms_norm_eps",
            "time_step_rank",
        ),  # it reads `head_dim`, `layer_norm_epsilon`
        *("partial_rotary_factor", "rope_theta"),  # its attention knows no positions
    ),
    "granitemoehybrid": (
        *("init_method", "normalization_function", "time_step_floor", "time_step_max", "time_step_min"),
    ),
    "lfm2": (
        *("block_dim", "block_norm_eps", "block_use_swiglu", "conv_dim", "conv_dim_out", "num_heads", "use_pos_enc"),
        *("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init"),
    ),
    "recurrent_gemma": ("attentions_num_heads", "embeddings_scale_by_sqrt_dim", "layer_norm_eps"),
    "xlstm": (
        *("add_embedding_dropout", "add_post_blocks_norm", "add_post_norm", "add_qk_norm", "cell_norm_eps", "head_dim"),
        *("forget_gate_bias_init", "force_bos_token_insert", "igate_bias_init_range", "lm_head_init_cfg"),
        *("chunkwise_kernel", "sequence_kernel", "step_kernel"),  # it knows their names only where their package is
    ),
}


def left_over(model_type: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a config holds."""
    return {name: config[name] for name in (*ANY, *OF.get(model_type, ())) if name in config}
