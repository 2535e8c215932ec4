"""Blocks of experts in transformers' own classes: the same weights, outputs and gradients."""

import pytest
import torch
from transformers import DeepseekV3Config, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import plait
from plait.layers import context_for

DIM, HIDDEN, SHARED = 64, 24, 40
# their routers compute in float32 whatever the model's dtype
TOLERANCE = 1e-5

TWINS = {
    "Mixtral": (
        MixtralSparseMoeBlock,
        MixtralConfig(hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=6, num_experts_per_tok=2),
        plait.MixtureOfExperts(experts=6, top_k=2, hidden=HIDDEN),
    ),
    "Qwen3-MoE, renormalized": (
        Qwen3MoeSparseMoeBlock,
        Qwen3MoeConfig(
            hidden_size=DIM, moe_intermediate_size=HIDDEN, num_experts=7, num_experts_per_tok=3, norm_topk_prob=True
        ),
        plait.MixtureOfExperts(experts=7, top_k=3, hidden=HIDDEN),
    ),
    "Qwen2-MoE, gated shared expert": (
        Qwen2MoeSparseMoeBlock,
        Qwen2MoeConfig(
            hidden_size=DIM,
            moe_intermediate_size=HIDDEN,
            shared_expert_intermediate_size=SHARED,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=False,
        ),
        plait.MixtureOfExperts(
            experts=6, top_k=2, hidden=HIDDEN, renormalize=False, shared_hidden=SHARED, shared_gate=True
        ),
    ),
    "DeepSeek-V3": (
        DeepseekV3MoE,
        DeepseekV3Config(
            hidden_size=DIM,
            moe_intermediate_size=HIDDEN,
            n_routed_experts=12,
            n_shared_experts=2,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
        ),
        plait.MixtureOfExperts(
            experts=12,
            top_k=3,
            hidden=HIDDEN,
            router="sigmoid",
            scale=2.5,
            groups=4,
            top_groups=2,
            shared_hidden=2 * HIDDEN,
            bias_rate=0.0,
        ),
    ),
}


def their_name(block, name):
    """Where the numbers of our weight are in their block; gate and up of a shared expert are two there."""
    shared = "shared_experts" if hasattr(block, "shared_experts") else "shared_expert"
    return {
        "router": ("gate.weight",),
        "router_bias": ("gate.e_score_correction_bias",),
        "experts_up": ("experts.gate_up_proj",),
        "experts_down": ("experts.down_proj",),
        "shared_up_proj.weight": (f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight"),
        "shared_down_proj.weight": (f"{shared}.down_proj.weight",),
        "shared_gate": ("shared_expert_gate.weight",),
    }[name]


@pytest.mark.parametrize("name", TWINS)
def test_the_same_block(name):
    kind, config, layer = TWINS[name]
    torch.manual_seed(0)
    config._experts_implementation = "eager"
    theirs = kind(config).double()
    tensors = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    for tensor in tensors.values():
        tensor.data.normal_(std=0.3)
    ours = plait.build(plait.ModelConfig(vocab=9, dim=DIM, pattern="E", layers={"E": layer}), dtype=torch.float64)
    ours = ours.slots[0].mixer
    for key, parameter in ours.named_parameters():
        parameter.data.copy_(torch.cat([tensors[part].data for part in their_name(theirs, key)]))
    x = torch.randn(2, 40, DIM, dtype=torch.float64, requires_grad=True)
    want, (got, _) = theirs(x), ours(x, context_for(x), None)
    close(got, want)
    direction = torch.randn_like(want)
    trained = {key: p for key, p in ours.named_parameters() if p.requires_grad}
    mine = torch.autograd.grad((got * direction).sum(), [x, *trained.values()])
    their = {key: [tensors[part] for part in their_name(theirs, key)] for key in trained}
    flat = torch.autograd.grad((want * direction).sum(), [x, *(p for parts in their.values() for p in parts)])
    close(mine[0], flat[0])
    left = iter(flat[1:])
    for key, gradient in zip(trained, mine[1:], strict=True):
        close(gradient, torch.cat([next(left) for _ in their[key]]))


def close(got, want):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()
