"""Hybrid families: transformers' class without kernel packages and plait, same weights, one process, turn by turn.

    python benchmarks/families.py [--only falcon_h1,bamba] [--batch 2] [--length 256] [--out benchmarks/results/families.json]

Random weights, about 4 to 12 million parameters, float32, on the CPU. Training: forward and backward of batch x length tokens.
Decoding: one row, a token at a time after 64 others, greedy, under torch.no_grad. Ratios are transformers' time over ours,
medians of turns. `bound` is the ratio that a training step would have which did nothing but our matrix products of weights,
which both must do.
"""

import argparse
import gc
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from plait.evaluate.machine import machine
from plait.hub.checkpoint import read
from plait.hub.parity import quiet
from plait.model import token_loss

HERE = Path(__file__).parent
PROMPT, TOKENS, TURNS = 64, 16, 3
CACHES = ("past_key_values", "cache_params")
SHAPE = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 704}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1}
DELTA = {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
THREE_OF_FOUR = (["linear_attention"] * 3 + ["full_attention"]) * 2
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 8, "state_size": 16},
    "mamba2": {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 8, "num_heads": 8, "n_groups": 1, "state_size": 64},
    "falcon_h1": {**SHAPE, **HEADS, **MAMBA2, "mamba_d_ssm": 512, "head_dim": 64},
    "bamba": {**SHAPE, **HEADS, **MAMBA2, "attn_layer_indices": [3, 7]},
    "granitemoehybrid": {
        **SHAPE, **HEADS, **MAMBA2, "shared_intermediate_size": 704, "num_local_experts": 0,
        "layer_types": (["mamba"] * 3 + ["attention"]) * 2, "position_embedding_type": None,
    },
    "nemotron_h": {
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, **HEADS, "head_dim": 64, "n_groups": 1,
        "layers_block_type": (["linear_attention", "mlp"] * 3 + ["full_attention", "mlp"]) * 2,
        "ssm_state_size": 64, "mamba_num_heads": 8, "mamba_head_dim": 64,
    },
    "jamba": {
        **SHAPE, **HEADS, "num_experts": 4, "attn_layer_period": 4, "attn_layer_offset": 3, "mamba_dt_rank": 16,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 704, "num_attention_heads": 4,
        "num_key_value_heads": 4, "mamba_d_state": 64, "n_mamba_heads": 8, "mamba_ngroups": 1, "adapter_rank": 16,
        "layers_block_type": (["mamba"] * 3 + ["hybrid"]) * 2, "use_mamba_kernels": False,
    },
    "lfm2": {**SHAPE, **HEADS, "layer_types": (["conv"] * 3 + ["full_attention"]) * 2, "block_auto_adjust_ff_dim": False},
    "recurrent_gemma": {
        "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 1408, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 64, "lru_width": 256, "attention_window_size": 128,
    },
    "xlstm": {
        "vocab_size": 4096, "hidden_size": 256, "embedding_dim": 256, "num_hidden_layers": 8, "num_blocks": 8, "num_heads": 4,
    },
    "minimax": {
        **SHAPE, **HEADS, "head_dim": 64, "num_local_experts": 2, "layer_types": THREE_OF_FOUR, "block_size": 64,
    },
    "qwen3_next": {
        **SHAPE, **HEADS, **DELTA, **EXPERTS, "num_experts": 4, "head_dim": 64, "layer_types": THREE_OF_FOUR,
        "mlp_only_layers": list(range(8)),
    },
    "qwen3_5_text": {**SHAPE, **HEADS, **DELTA, "head_dim": 64, "layer_types": THREE_OF_FOUR},
    "qwen3_5_moe_text": {
        **{name: size for name, size in SHAPE.items() if name != "intermediate_size"}, **HEADS, **DELTA, **EXPERTS,
        "num_experts": 4, "head_dim": 64, "layer_types": THREE_OF_FOUR,
    },
    "olmo_hybrid": {**SHAPE, **HEADS, **DELTA, "layer_types": THREE_OF_FOUR},
    "kimi_linear": {
        **SHAPE, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 64, "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32, "v_head_dim": 32, "num_experts": 4, "num_experts_per_token": 2, "moe_intermediate_size": 256,
        "linear_num_heads": 4, "linear_head_dim": 64, "layer_types": THREE_OF_FOUR, "mlp_layer_types": ["dense"] * 8,
    },
}  # fmt: skip


def models(name: str, folder: Path) -> tuple[Any, Any]:
    config = CONFIG_MAPPING[name](**CONFIGS[name], **IDS)
    with quiet():
        torch.manual_seed(0)
        theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        theirs.save_pretrained(folder)
    return theirs, read(folder)


def train_theirs(model: Any, tokens: torch.Tensor) -> None:
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    model.zero_grad()


def train_ours(model: Any, tokens: torch.Tensor) -> None:
    total, count = token_loss(model, tokens[:, :-1], tokens[:, 1:])
    (total / count).backward()
    model.zero_grad()


@torch.no_grad()
def decode_theirs(model: Any, prompt: torch.Tensor) -> float:
    out = model(input_ids=prompt, use_cache=True)
    start = perf_counter()
    for _ in range(TOKENS):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, use_cache=True, **{name: out[name] for name in CACHES if name in out})
    return (perf_counter() - start) / TOKENS


@torch.no_grad()
def decode_ours(model: Any, prompt: torch.Tensor) -> float:
    logits, state = model(prompt, model.init_state(batch=1))
    start = perf_counter()
    for _ in range(TOKENS):
        logits, state = model(logits[:, -1:].argmax(-1), state)
    return (perf_counter() - start) / TOKENS


def timed(run: Callable[..., Any], *args: Any) -> float:
    start = perf_counter()
    run(*args)
    return perf_counter() - start


def products_ms(model: Any, tokens: torch.Tensor) -> float:
    """Milliseconds that a training step spends in products of matrices of weights."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train_ours(model, tokens)
    return sum(e.self_cpu_time_total for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm")) / 1e3


def measured(name: str, batch: int, length: int) -> dict[str, Any]:
    """Medians of turns, in milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = models(name, Path(folder))
    tokens = torch.randint(4096, (batch, length + 1))
    times: dict[str, list[float]] = {"train_theirs": [], "train_ours": [], "decode_theirs": [], "decode_ours": []}
    for turn in range(TURNS + 1):
        now = {
            "train_theirs": timed(train_theirs, theirs.train(), tokens),
            "train_ours": timed(train_ours, ours.train(), tokens),
            "decode_theirs": decode_theirs(theirs.eval(), tokens[:1, :PROMPT]),
            "decode_ours": decode_ours(ours.eval(), tokens[:1, :PROMPT]),
        }
        for key, value in now.items() if turn else ():  # the first turn warms up
            times[key].append(value * 1e3)
    found: dict[str, Any] = {key: round(statistics.median(values), 3) for key, values in times.items()}
    parameters = sum(p.numel() for p in ours.parameters())
    ratios = {kind: round(found[f"{kind}_theirs"] / found[f"{kind}_ours"], 2) for kind in ("train", "decode")}
    products = statistics.median(products_ms(ours.train(), tokens) for _ in range(TURNS))
    bound = {"products": round(products, 3), "bound": round(found["train_theirs"] / products, 2)}
    return {"pattern": ours.design.pattern, "parameters": parameters, **found, **ratios, **bound}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(CONFIGS))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "families.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name in arguments.only.split(","):
        results[name] = measured(name, arguments.batch, arguments.length)
        row = results[name]
        print(
            f"{name:<18} {row['pattern']:<24} training {row['train']:5.2f}x of {row['bound']:5.2f}x  "
            f"decoding {row['decode']:5.2f}x",
            flush=True,
        )
        gc.collect()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    shape = {
        "batch": arguments.batch,
        "length": arguments.length,
        "prompt": PROMPT,
        "tokens": TOKENS,
        "turns": TURNS,
        "threads": torch.get_num_threads(),
    }
    data = {"machine": machine(), **versions, **shape, "milliseconds and ratios": results}
    arguments.out.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
