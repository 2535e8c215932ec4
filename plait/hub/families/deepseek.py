"""DeepSeek V2 and V3 (and what says it is V3: Moonlight): latent attention, experts in groups behind some dense layers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from plait.design.layers import LatentAttention, MixtureOfExperts, SwiGLU
from plait.design.layers.rope import YaRN
from plait.design.model import ModelConfig
from plait.hub.families.family import Family, Named, first
from plait.hub.families.fields import Fields, rope, rope_parameters
from plait.hub.families.llama import SWIGLU, size_config, swiglu, transformer_design
from plait.hub.families.moe import ROUTED, routed
from plait.hub.families.tiny import transformer
from plait.hub.weight_table import Form, Rows, Rules

EXPERTS: Rules = {
    **ROUTED,
    "mixer.router_bias": "mlp.gate.e_score_correction_bias",
    "mixer.shared_up_proj": "mlp.shared_experts.{part}_proj",
    "mixer.shared_down_proj": "mlp.shared_experts.down_proj",
}
LATENT_EPS = 1e-6  # of the latents' norms, which no field says
DIGITS = 9  # of a factor that is worked out again


@dataclass(frozen=True)
class _Turned:
    """Behind `still` rows of each of `groups` equal groups are `turned` ones, whose pairs are neighbours in theirs; in ours the
    first members of all pairs stand before the second ones."""

    groups: int
    still: int
    turned: int

    def read(self, x: Tensor) -> Tensor:
        return self._apart(x, lambda y: y.unflatten(1, (-1, 2)).transpose(1, 2))

    def write(self, x: Tensor) -> Tensor:
        return self._apart(x, lambda y: y.unflatten(1, (2, -1)).transpose(1, 2))

    def _apart(self, x: Tensor, order: Any) -> Tensor:
        still, turned = x.unflatten(0, (self.groups, -1)).split_with_sizes((self.still, self.turned), 1)
        return torch.cat([still, order(turned).flatten(1, 2)], 1).flatten(0, 1)

    @property
    def form(self) -> Form:
        return Form(self.read, self.write)


def latent(a: LatentAttention) -> Rules:
    """Where the weights of latent attention lie."""
    queries = _Turned(a.heads, a.nope_dim, a.rope_dim).form
    direct = Rows("self_attn.q_proj", ("q",), form=queries)
    return {
        "norm": "input_layernorm",
        "mixer.in_proj": (
            Rows("self_attn.q_a_proj", ("q",)) if a.query_rank else direct,
            Rows("self_attn.kv_a_proj_with_mqa", ("kv", "k_rope"), form=_Turned(1, a.rank, a.rope_dim).form),
        ),
        "mixer.q_norm": "self_attn.q_a_layernorm",
        "mixer.q_proj": Rows("self_attn.q_b_proj", form=queries),
        "mixer.kv_norm": "self_attn.kv_a_layernorm",
        "mixer.k_up + mixer.v_up": Rows("self_attn.kv_b_proj.weight", groups=a.heads),
        "mixer.o_proj": "self_attn.o_proj",
    }


def _slots(design: ModelConfig) -> Iterator[Named]:
    rules = {SwiGLU: SWIGLU, MixtureOfExperts: EXPERTS}
    for i, slot in enumerate(design.slots):
        layer: Any = slot.layer  # type: ignore[union-attr]  # no parallel slot passes `holds`
        own = latent(layer) if isinstance(layer, LatentAttention) else rules[type(layer)]
        yield Named(f"slots.{i}.", f"model.layers.{i // 2}.", own)


def latent_attention(f: Fields) -> LatentAttention:
    nope, turned, factor = f["qk_nope_head_dim"], f["qk_rope_head_dim"], _sharper(f["rope_parameters"])
    f.must(attention_bias=False, num_key_value_heads=f["num_attention_heads"], head_dim=turned)
    f.carried("qk_head_dim")  # which follows from its parts
    return LatentAttention(
        heads=f["num_attention_heads"],
        nope_dim=nope,
        rope_dim=turned,
        value_dim=f["v_head_dim"],
        rank=f["kv_lora_rank"],
        query_rank=f.get("q_lora_rank"),
        rope=rope(f),
        scale=None if factor == 1 else (nope + turned) ** -0.5 * factor * factor,
        norm_eps=None if f["rms_norm_eps"] == LATENT_EPS else LATENT_EPS,
    )


def _sharper(parameters: dict[str, Any]) -> float:
    """What YaRN's `mscale_all_dim` multiplies queries and keys by."""
    all_dim, factor = parameters.get("mscale_all_dim"), parameters.get("factor", 1.0)
    return 1.0 if not all_dim or factor <= 1 else 0.1 * all_dim * math.log(factor) + 1.0


def _latent_config(a: LatentAttention) -> dict[str, Any]:
    turns = {} if a.rope is None else {"rope_parameters": rope_parameters(a.rope)}
    if a.scale is not None and a.rope and isinstance(a.rope.scaling, YaRN) and a.rope.scaling.factor > 1:
        sharper = math.sqrt(a.scale * math.sqrt(a.key_dim))
        all_dim = (sharper - 1) / (0.1 * math.log(a.rope.scaling.factor))
        turns["rope_parameters"]["mscale_all_dim"] = round(all_dim, DIGITS)
    return turns | {
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.heads,
        "qk_nope_head_dim": a.nope_dim,
        "qk_rope_head_dim": a.rope_dim,
        "v_head_dim": a.value_dim,
        "kv_lora_rank": a.rank,
        "q_lora_rank": a.query_rank,
    }


def _design(f: Fields, **own: Any) -> ModelConfig:
    blocks, dense = f["num_hidden_layers"], f["first_k_dense_replace"]
    f.must(moe_layer_freq=1)
    f.carried("ep_size", "aux_loss_alpha", "seq_aux", "num_nextn_predict_layers")  # training's, and another model's
    experts = routed(
        f,
        experts=f["n_routed_experts"],
        hidden=f["moe_intermediate_size"],
        scale=f["routed_scaling_factor"],
        shared_hidden=f["moe_intermediate_size"] * f["n_shared_experts"],
        **own,
    )
    channels = ["F" if i < dense else "E" for i in range(blocks)]
    return transformer_design(f, ["L"] * blocks, {"L": latent_attention(f), "F": swiglu(f), "E": experts}, channels)


def _v2(f: Fields) -> ModelConfig:
    f.must(mlp_bias=False, norm_topk_prob=False, scoring_func="softmax")
    groups, top = f.get("n_group", 1), f.get("topk_group", 1)
    grouped = f.one_of("topk_method", {"greedy": False, "group_limited_greedy": True}) and groups > 1
    own = {"groups": groups, "top_groups": top, "group_best": 1} if grouped else {}
    return _design(f, renormalize=False, **own)


def _v3(f: Fields) -> ModelConfig:
    f.must(rope_interleave=True, scoring_func="sigmoid", topk_method="noaux_tc")
    own = {"router": "sigmoid", "renormalize": f["norm_topk_prob"], "bias_rate": 0.0}
    return _design(f, groups=f["n_group"], top_groups=f["topk_group"], **own)


def _config(design: ModelConfig, family: str) -> dict[str, Any]:
    a, e = first(design, LatentAttention, family), first(design, MixtureOfExperts, family)
    dense = [slot.layer for slot in design.slots[1::2] if isinstance(slot.layer, SwiGLU)]  # type: ignore[union-attr]  # no parallel slot passes `holds`
    return (
        size_config(design)
        | _latent_config(a)
        | {
            "first_k_dense_replace": len(dense),
            **({"intermediate_size": dense[0].hidden} if dense else {}),
            "n_routed_experts": e.experts,
            "num_experts_per_tok": e.top_k,
            "moe_intermediate_size": e.hidden,
            "n_shared_experts": (e.shared_hidden or 0) // (e.hidden or 1),
            "routed_scaling_factor": e.scale,
            "norm_topk_prob": e.renormalize,
            "n_group": e.groups,
            "topk_group": e.top_groups,
        }
    )


def _v2_config(design: ModelConfig) -> dict[str, Any]:
    e = first(design, MixtureOfExperts, "deepseek_v2")
    return _config(design, "deepseek_v2") | {"topk_method": "group_limited_greedy" if e.groups > 1 else "greedy"}


def _tiny(draw: Random) -> dict[str, Any]:
    config = transformer(draw, head_dim=False)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
    sharp = {"mscale": draw.choice([0.707, 1.0]), "mscale_all_dim": draw.choice([0.707, 1.0])}
    return config | {
        "num_key_value_heads": config["num_attention_heads"],
        "first_k_dense_replace": draw.choice([0, 1]),
        "n_routed_experts": 6,
        "num_experts_per_tok": draw.choice([1, 2]),
        "n_shared_experts": draw.choice([1, 2]),
        "moe_intermediate_size": 24,
        "routed_scaling_factor": draw.choice([1.0, 2.5]),
        **draw.choice(
            [{"n_group": 1, "topk_group": 1}, {"n_group": 3, "topk_group": 2}, {"n_group": 2, "topk_group": 1}]
        ),
        "kv_lora_rank": draw.choice([12, 16]),
        "q_lora_rank": draw.choice([None, 20]),
        "qk_nope_head_dim": draw.choice([6, 10]),
        "qk_rope_head_dim": draw.choice([4, 6]),
        "v_head_dim": draw.choice([5, 8]),
        **draw.choice([{}, {"rope_parameters": yarn}, {"rope_parameters": yarn | sharp}]),
    }


def _tiny_v2(draw: Random) -> dict[str, Any]:
    return _tiny(draw) | {"topk_method": draw.choice(["greedy", "group_limited_greedy"]), "norm_topk_prob": False}


def _tiny_v3(draw: Random) -> dict[str, Any]:
    return _tiny(draw) | {"norm_topk_prob": draw.random() < 0.7, "qk_nope_head_dim": draw.choice([6, 9])}


def _family(model_type: str, architecture: str, design: Any, config: Any, tiny: Any) -> Family:
    return Family(
        model_type=model_type,
        architecture=f"{architecture}ForCausalLM",
        design=design,
        config=config,
        slots=_slots,
        tiny=tiny,
        holds=(LatentAttention, SwiGLU, MixtureOfExperts),
        alike=(("rope_parameters",), ("topk_method", "n_group", "topk_group")),
        aliases=(r".*rotary_emb\.inv_freq", r"model\.layers\.61\..*"),  # V3's layer 61 guesses further tokens
    )


FAMILIES = (
    _family("deepseek_v2", "DeepseekV2", _v2, _v2_config, _tiny_v2),
    _family("deepseek_v3", "DeepseekV3", _v3, lambda design: _config(design, "deepseek_v3"), _tiny_v3),
)
