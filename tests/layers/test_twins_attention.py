"""Attention layers are what transformers' own attention modules are, on the same random weights: outputs, gradients at the
input and at every weight, and a token at a time from a state."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama4 import modeling_llama4 as llama4

import plait
from plait.layers.context import context_for
from plait.layers.rope import frequencies

DIM, LENGTH = 64, 41
# transformers turns positions, norms latents and weighs keys in float32, whatever its model's dtype: the rounding of sums of
# some hundred numbers
TOLERANCE = 1e-5


@dataclass
class Twin:
    """Their module, what it is called with beside x, our layer, and their weights by our names."""

    module: nn.Module
    call: dict[str, Any]
    layer: plait.Layer
    weights: dict[str, Tensor]


def causal(window: int = LENGTH) -> Tensor:
    at = torch.arange(LENGTH)
    gap = at[:, None] - at
    seen = (gap >= 0) & (gap < window)
    return torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~seen, -torch.inf).double()


def positions(rotary: nn.Module) -> Any:
    return rotary(torch.zeros(1, LENGTH, DIM, dtype=torch.float64), torch.arange(LENGTH)[None])


YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
SCALED = {"theta": 1000.0, "scaling": {"kind": "yarn", "factor": 4.0, "original": 16}}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
THREE = {"theta": 1000.0, "scaling": {"kind": "llama3", "factor": 4.0, "original": 32}}
ROWS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}


def latent(query_rank: int | None, config: Any, module: Any, rotary: Any, **options: Any) -> Twin:
    """Their rows for q and k with positions turn in pairs of neighbours."""
    sizes = {"qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14, "kv_lora_rank": 22}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = config(hidden_size=DIM, q_lora_rank=query_rank, **heads, **sizes, **options)
    module, rotary = module(config, 0), rotary(config)
    theirs = drawn(module)
    apart = torch.cat([torch.arange(0, 6, 2), torch.arange(1, 6, 2)])
    low, up = theirs["kv_a_proj_with_mqa.weight"], theirs["kv_b_proj.weight"].unflatten(0, (4, 24))
    queries = theirs["q_proj.weight" if query_rank is None else "q_b_proj.weight"].unflatten(0, (4, 16))
    queries = torch.cat([queries[:, :10], queries[:, 10:][:, apart]], 1).flatten(0, 1)
    first = queries if query_rank is None else theirs["q_a_proj.weight"]
    weights = {
        "in_proj.weight": torch.cat([first, low[:22], low[22:][apart]]),
        "kv_norm.weight": theirs["kv_a_layernorm.weight"],
        "k_up": up[:, :10],
        "v_up": up[:, 10:],
        "o_proj.weight": theirs["o_proj.weight"],
    }
    if query_rank is not None:
        weights |= {"q_norm.weight": theirs["q_a_layernorm.weight"], "q_proj.weight": queries}
    rope = SCALED if "rope_parameters" in options else {}
    layer = plait.LatentAttention(
        heads=4, nope_dim=10, rope_dim=6, value_dim=14, rank=22, query_rank=query_rank, rope=rope
    )
    return Twin(module, {"position_embeddings": positions(rotary)}, layer, weights)


def fused(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {"qkv_proj.weight": torch.cat([theirs[f"{name}_proj.weight"] for name in "qkv"])}
    if "q_proj.bias" in theirs:
        weights["qkv_proj.bias"] = torch.cat([theirs[f"{name}_proj.bias"] for name in "qkv"])
    return weights | {name: x for name, x in theirs.items() if name.startswith(("o_proj", "sinks"))}


def with_sinks(window: int | None) -> Twin:
    kind = "full_attention" if window is None else "sliding_attention"
    rope = {"rope_type": "default", "rope_theta": 1000.0}
    config = GptOssConfig(
        hidden_size=DIM,
        layer_types=[kind],
        num_hidden_layers=1,
        sliding_window=window or 128,
        rope_parameters=rope,
        **ROWS,
    )
    config.attention_bias = True
    module = gpt_oss.GptOssAttention(config, 0)
    layer = plait.Attention(
        heads=4, kv_heads=2, head_dim=12, sinks=True, bias=True, window=window, rope=plait.RoPE(theta=1000.0)
    )
    call = {"position_embeddings": positions(gpt_oss.GptOssRotaryEmbedding(config))}
    return Twin(module, call | {"attention_mask": causal(window or LENGTH)}, layer, fused(drawn(module)))


def scaled(parameters: dict[str, Any], rope: dict[str, Any]) -> Twin:
    config = LlamaConfig(hidden_size=DIM, rope_parameters=parameters, max_position_embeddings=64, **ROWS)
    module = llama.LlamaAttention(config, 0)
    layer = plait.Attention(heads=4, kv_heads=2, head_dim=12, rope=rope)
    call = {"position_embeddings": positions(llama.LlamaRotaryEmbedding(config))}
    return Twin(module, call, layer, fused(drawn(module)))


def with_temperature() -> Twin:
    config = Llama4TextConfig(
        hidden_size=DIM, num_hidden_layers=1, no_rope_layers=[0], floor_scale=7, attn_scale=0.3, attention_chunk_size=None,
        **ROWS,
    )  # fmt: skip
    module = llama4.Llama4TextAttention(config, 0)
    layer = plait.Attention(
        heads=4, kv_heads=2, head_dim=12, rope=None, temperature=plait.Temperature(scale=0.3, every=7)
    )
    return Twin(module, {"position_embeddings": None}, layer, fused(drawn(module)))


def drawn(module: nn.Module) -> dict[str, Tensor]:
    """Its weights, at random."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0)
    module.double().config._attn_implementation = "eager"
    return dict(module.named_parameters())


V3 = DeepseekV3Config, v3.DeepseekV3Attention, v3.DeepseekV3RotaryEmbedding
TWINS = {
    "latent, V2": lambda: latent(None, DeepseekV2Config, v2.DeepseekV2Attention, v2.DeepseekV2RotaryEmbedding),
    "latent, V3, queries from a latent": lambda: latent(26, *V3),
    "latent, V3, yarn": lambda: latent(26, *V3, rope_parameters=YARN),
    "sinks": lambda: with_sinks(None),
    "sinks in a window": lambda: with_sinks(9),
    "yarn": lambda: scaled(YARN, SCALED),
    "llama3": lambda: scaled(LLAMA3 | {"original_max_position_embeddings": 32}, THREE),
    "a temperature": with_temperature,
}


@pytest.fixture(params=TWINS.values(), ids=TWINS)
def twin(request: Any) -> Twin:
    torch.manual_seed(0)
    return request.param()


def ours(twin: Twin) -> tuple[plait.LanguageModel, Any]:
    design = plait.ModelConfig(vocab=3, dim=DIM, pattern="A", layers={"A": twin.layer})
    model = plait.build(design, dtype=torch.float64)
    module = model.place("A#0")
    module.load_state_dict({name: x.detach() for name, x in twin.weights.items()})
    return model, module


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


def test_outputs_and_gradients(twin):
    x = torch.randn(2, LENGTH, DIM, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    _, module = ours(twin)
    got, _ = module(x, context_for(x), None)
    want, _ = twin.module(x, **{"attention_mask": causal()} | twin.call)
    close(got, want)
    mine = dict(module.named_parameters())
    leaves, theirs = [x, *(mine[name] for name in twin.weights)], list(twin.module.parameters())
    gradients = torch.autograd.grad((got * weight).sum(), leaves)
    found = torch.autograd.grad((want * weight).sum(), [x, *theirs], retain_graph=True)
    close(gradients[0], found[0])
    # each weight of ours is made of theirs, so that its gradient is a part of theirs
    moved = torch.autograd.grad(list(twin.weights.values()), theirs, gradients[1:])
    for mine, hers in zip(moved, found[1:], strict=True):
        close(mine, hers)


@torch.no_grad()
def test_from_a_state(twin):
    """Some tokens at once, and then one by one."""
    x = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    want, _ = twin.module(x, **{"attention_mask": causal()} | twin.call)
    model, module = ours(twin)
    (state,), got, seen = model.init_state(2).slots, [], 0
    for part in x.split([30, *[1] * 11], 1):
        y, state = module(part, context_for(part, torch.tensor([seen, seen]), (seen, seen)), state)
        got.append(y)
        seen += part.shape[1]
    close(torch.cat(got, 1), want)


@pytest.mark.parametrize(
    ("parameters", "scaling"),
    [
        ({"rope_type": "linear", "factor": 3.0}, {"kind": "linear", "factor": 3.0}),
        ({"rope_type": "dynamic", "factor": 1.0}, {"kind": "ntk", "factor": 5.0}),  # at five times the positions
        (YARN, SCALED["scaling"]),
        (YARN | {"truncate": False, "beta_fast": 20.0, "beta_slow": 2.0},
         SCALED["scaling"] | {"truncate": False, "beta_fast": 20.0, "beta_slow": 2.0}),
        (YARN | {"attention_factor": 1.7}, SCALED["scaling"] | {"attention_factor": 1.7}),
        (YARN | {"original_max_position_embeddings": 32768}, SCALED["scaling"] | {"original": 32768}),
        (LLAMA3 | {"original_max_position_embeddings": 32}, THREE["scaling"]),
        (LLAMA3 | {"original_max_position_embeddings": 8192, "factor": 8.0}, {"kind": "llama3"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("theta", "fraction"), [(10_000.0, 1.0), (500_000.0, 0.5)])
def test_frequencies(parameters, scaling, theta, fraction):
    whole = {"rope_theta": theta, "partial_rotary_factor": fraction} | parameters | {"rope_theta": theta}
    config = LlamaConfig(rope_parameters=whole, head_dim=64, max_position_embeddings=64)
    want, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=5 * 64)
    rope = plait.RoPE(theta=theta, fraction=fraction, scaling=scaling)
    got, mine = frequencies(rope, rope.rotated(64), torch.device("cpu"), torch.float32)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert mine == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("attention", [{}, {"attention_factor": 1.3}])
def test_frequencies_of_longrope(attention):
    """Those for texts within the original positions."""
    numbers, sizes = [1 + i / 5 for i in range(16)], {"factor": 4.0} | attention
    given = {"rope_type": "longrope", "short_factor": numbers, "long_factor": [9.0] * 16, **sizes}
    whole = {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64} | given
    config = LlamaConfig(rope_parameters=whole, head_dim=64, max_position_embeddings=256)
    want, factor = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=64)
    rope = plait.RoPE(fraction=0.5, scaling={"kind": "longrope", "original": 64, "factors": numbers, **sizes})
    got, mine = frequencies(rope, rope.rotated(64), torch.device("cpu"), torch.float32)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert mine == pytest.approx(factor, rel=1e-6)
    with pytest.raises(ValueError, match="16 factors, and 32 pairs"):
        plait.Attention(head_dim=64, rope=rope.replace(fraction=1.0)).resolve(64)
