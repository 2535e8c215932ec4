"""Train and decode speed beside the transformers class of the same design, in one process.

    python benchmarks/cpu_models.py [--pairs llama,qwen3_next,...] [--rounds 5] [--out benchmarks/results/cpu_models.json]

Each pair has the same widths, heads, vocabulary and depth, the same optimiser (AdamW), float32 and the same tokens. The
two sides take turns, round by round, so that a busy machine slows both; figures are medians and ratios of medians.

Rows of unequal lengths are decoded beside rows of one length. Ratios to peers change with the machine, so there is one to
ourselves: a training step over the time of its weights' matrix products alone. Its bars hold for two cores with AVX2 only
(`ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2`).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import plait
from plait.engine.decode import Decoding
from plait.engine.sampling import Sampling
from plait.evaluate.machine import machine
from plait.model import token_loss

VOCAB, DIM, BLOCKS, HIDDEN = 4096, 256, 8, 704
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": HIDDEN}
A = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 64}
F = {"kind": "swiglu", "hidden": HIDDEN}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, **ATTENTION, num_hidden_layers=BLOCKS))


def qwen3_next() -> nn.Module:
    """As wide in keys and twice as wide in values as the model, with the class's own heads of 128."""
    config = transformers.Qwen3NextConfig(
        **COMMON, **ATTENTION, num_hidden_layers=BLOCKS, mlp_only_layers=list(range(BLOCKS)), partial_rotary_factor=0.25,
        linear_num_key_heads=2, linear_num_value_heads=4,
    )  # fmt: skip
    return transformers.Qwen3NextForCausalLM(config)


def mamba2() -> nn.Module:
    """Twice the layers, since it has no feed-forward ones: 8.5M parameters against 9.1M of (MF)8."""
    config = transformers.Mamba2Config(
        **COMMON,
        num_hidden_layers=2 * BLOCKS,
        num_heads=8,
        head_dim=64,
        state_size=128,
        n_groups=1,
        expand=2,
        conv_kernel=4,
    )
    return transformers.Mamba2ForCausalLM(config)


def falcon_h1() -> nn.Module:
    config = transformers.FalconH1Config(
        **COMMON, **ATTENTION, num_hidden_layers=BLOCKS, mamba_d_ssm=512, mamba_n_heads=8, mamba_d_head=64,
        mamba_n_groups=1, mamba_d_state=128, mamba_expand=2,
    )  # fmt: skip
    return transformers.FalconH1ForCausalLM(config)


def ours(pattern: str, **changes: Any) -> Callable[[], nn.Module]:
    layers = {"A": A, "F": F} | changes.pop("layers", {})
    return lambda: plait.build(plait.ModelConfig(vocab=VOCAB, dim=DIM, pattern=pattern, layers=layers, **changes))


QWEN = {
    "layers": {
        "A": A | {"qk_norm": True, "output_gate": True, "rope": {"fraction": 0.25}},
        "D": {"kind": "gated_deltanet", "heads": 2, "head_dim": 128, "value_heads": 4},
    },
    "norm": {"zero_centered": True},
}
FALCON = {"merge": {"kind": "sum", "branch_norm": False}}

# name: (peer, ours, the issue's bar for training, the bar for decoding)
PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], float, float]] = {
    "(AF)8 | Llama": (llama, ours("(AF)8"), 1.0, 2.0),
    "((DF)3 AF)2 | Qwen3-Next": (qwen3_next, ours("((DF)3 AF)2", **QWEN), 3.0, 2.0),
    "(MF)8 | Mamba-2": (mamba2, ours("(MF)8"), 5.0, 2.0),
    "(M)16 | Mamba-2": (mamba2, ours("(M)16"), 5.0, 2.0),
    "([M|A]F)8 | Falcon-H1": (falcon_h1, ours("([M|A]F)8", **FALCON), 3.0, 2.0),
}
# hybrids against our own transformer, at its parameter count: (pattern, bar)
HYBRIDS = {"((DF)3 AF)2": 0.8, "([D|A]F)8": 0.8, "([M|A]F)8": 0.8}
# a training step over its weights' matrix products alone: (pattern, bar)
PRODUCTS = {"(AF)4": 1.4, "(DF)3 AF": 1.7, "M4": 1.6}
# eight rows of unequal lengths, LENGTH tokens in the mean, over eight that have as many
RAGGED, RAGGED_BAR, LENGTH = ("(AF)8", "((DF)3 AF)2", "(MF)8", "((GF)3 AF)2"), 0.9, 128


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    if isinstance(model, plait.LanguageModel):
        total, scored = token_loss(model, tokens[:, :-1], tokens[:, 1:])
        return total / scored
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss  # shifts by itself


def trainer(model: nn.Module, tokens: torch.Tensor) -> Callable[[], float]:
    """One call is one training step; gives its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        start = time.perf_counter()
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return step


def decoder(model: nn.Module, prompt: torch.Tensor, count: int) -> Callable[[], float]:
    """One call decodes `count` tokens greedily after the prompt; gives seconds per token, the prompt not counted."""

    @torch.inference_mode()
    def run() -> float:
        is_ours = isinstance(model, plait.LanguageModel)
        if is_ours:
            logits, state = model(prompt, model.init_state(1))
        else:
            out = model(input_ids=prompt, use_cache=True)
            logits, state = out.logits, cache_of(out)
        start = time.perf_counter()
        for _ in range(count):
            token = logits[:, -1].argmax(-1, keepdim=True)
            if is_ours:
                logits, state = model(token, state)
            else:
                out = model(input_ids=token, use_cache=True, **{cache_name(model): state})
                logits, state = out.logits, cache_of(out)
        return (time.perf_counter() - start) / count

    return run


def cache_name(model: nn.Module) -> str:
    return "cache_params" if isinstance(model, transformers.Mamba2ForCausalLM) else "past_key_values"


def cache_of(out: Any) -> Any:
    return out.get("past_key_values", out.get("cache_params"))


def turns(runs: list[Callable[[], float]], rounds: int) -> list[float]:
    """Median of each run, taken in turns after one warm-up."""
    for run in runs:
        run()
    times = [[run() for run in runs] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def compare(name: str, batch: int, length: int, rounds: int) -> dict[str, Any]:
    make_peer, make_ours, train_bar, decode_bar = PAIRS[name]
    torch.manual_seed(0)
    peer, mine = make_peer(), make_ours()
    tokens = torch.randint(VOCAB, (batch, length + 1))
    peer_s, mine_s = turns([trainer(peer.train(), tokens), trainer(mine, tokens)], rounds)
    peer_decode, mine_decode = turns([decoder(m.eval(), tokens[:1, :64], 32) for m in (peer, mine)], rounds)
    row = {
        "pair": name,
        "parameters": {"peer": peer.num_parameters(), "plait": sum(p.numel() for p in mine.parameters())},
        "train_tokens_per_s": {"peer": batch * length / peer_s, "plait": batch * length / mine_s},
        "train_ratio": peer_s / mine_s,
        "train_bar": train_bar,
        "decode_ms": {"peer": peer_decode * 1e3, "plait": mine_decode * 1e3},
        "decode_ratio": peer_decode / mine_decode,
        "decode_bar": decode_bar,
    }
    print(
        f"{name:<26} train {row['train_tokens_per_s']['plait']:7.0f} tokens/s, {row['train_ratio']:5.2f}x (bar {train_bar}x)"
        f"   decode {mine_decode * 1e3:6.2f} ms, {row['decode_ratio']:5.2f}x (bar {decode_bar}x)",
        flush=True,
    )
    return row


def hybrids(batch: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """Our hybrids against our transformer at its number of parameters (feed-forward width makes up the difference)."""
    tokens = torch.randint(VOCAB, (batch, length + 1))
    base = plait.build(ours_design("(AF)8", HIDDEN))
    target = sum(p.numel() for p in base.parameters())
    models = {"(AF)8": base}
    for pattern in HYBRIDS:
        widths = range(64, 1024, 8)
        count = plait.design.count.parameters
        hidden = min(widths, key=lambda w: abs(count(ours_design(pattern, w)) - target))  # noqa: B023 (used at once)
        models[pattern] = plait.build(ours_design(pattern, hidden))
    seconds = turns([trainer(model, tokens) for model in models.values()], rounds)
    rows = []
    for (pattern, model), s in zip(models.items(), seconds, strict=True):
        rows.append(
            {
                "pattern": pattern,
                "parameters": sum(p.numel() for p in model.parameters()),
                "train_tokens_per_s": batch * length / s,
                "ratio": seconds[0] / s,
                "bar": HYBRIDS.get(pattern),
            }
        )
        print(
            f"{pattern:<14} {rows[-1]['train_tokens_per_s']:7.0f} tokens/s, {rows[-1]['ratio']:.2f} of (AF)8",
            flush=True,
        )
    return rows


def products(design: plait.ModelConfig, rows: int) -> Callable[[], float]:
    """One call is the products of a training step with all weights that are matrices, for `rows` tokens; gives its seconds."""
    matrices = [torch.randn(w.shape) for w in plait.design.declared.weights(design) if w.role == "matrix"]
    if design.tied:
        matrices.append(torch.randn(design.vocab, design.dim))  # the embeddings, as the head uses them
    x = {width: torch.randn(rows, width) for W in matrices for width in W.shape}

    @torch.inference_mode()
    def run() -> float:
        start = time.perf_counter()
        for W in matrices:
            dy, into = (x[width] for width in W.shape)
            torch.mm(into, W.mT)  # y
            torch.mm(dy, W)  # dx
            torch.mm(dy.mT, into)  # dW
        return time.perf_counter() - start

    return run


def step_over_products(batch: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """A step is short here, and one that is held up says nothing: medians of many more turns."""
    rows, tokens = [], torch.randint(VOCAB, (batch, length + 1))
    for pattern, bar in PRODUCTS.items():
        design = ours_design(pattern, HIDDEN)
        step_s, products_s = turns([trainer(plait.build(design), tokens), products(design, batch * length)], 8 * rounds)
        ratio = step_s / products_s
        rows.append(
            {"pattern": pattern, "step_ms": step_s * 1e3, "products_ms": products_s * 1e3, "ratio": ratio, "bar": bar}
        )
        print(f"{pattern:<10} step {step_s * 1e3:6.1f} ms, {ratio:.2f} of its products (bar {bar})", flush=True)
    return rows


def writer(model: plait.LanguageModel, lengths: list[int], count: int) -> Callable[[], float]:
    """One call continues prompts of these lengths together by `count` tokens; gives seconds per step, reading not counted."""
    prompts = [torch.randint(VOCAB, (length,)).tolist() for length in lengths]

    def run() -> float:
        decoding = Decoding(model, prompts, max_tokens=count + 1, sampling=Sampling(temperature=0.0))
        decoding.step()  # chosen already
        start = time.perf_counter()
        for _ in range(count):
            decoding.step()
        return (time.perf_counter() - start) / count

    return run


def ragged(rounds: int) -> list[dict[str, Any]]:
    """Decoding eight rows of unequal lengths beside eight of their mean length, on a pool as `plait.generate` does."""
    rows = []
    for pattern in RAGGED:
        model = plait.build(ours_design(pattern, HIDDEN)).eval()
        unequal = [int(LENGTH * (1 + (i - 3.5) / 7)) for i in range(8)]
        even_s, ragged_s = turns([writer(model, lengths, 32) for lengths in ([LENGTH] * 8, unequal)], 3 * rounds)
        ratio = even_s / ragged_s
        rows.append({"pattern": pattern, "lengths": unequal, "even_ms": even_s * 1e3, "ragged_ms": ragged_s * 1e3})
        rows[-1] |= {"ratio": ratio, "bar": RAGGED_BAR}
        print(f"{pattern:<12} ragged {ragged_s * 1e3:5.2f} ms, {ratio:.2f} of even (bar {RAGGED_BAR})", flush=True)
    return rows


def ours_design(pattern: str, hidden: int) -> plait.ModelConfig:
    layers = {"A": A, "F": F | {"hidden": hidden}}
    return plait.ModelConfig(vocab=VOCAB, dim=DIM, pattern=pattern, layers=layers)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", default="")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--no-hybrids", action="store_true")
    parser.add_argument("--no-products", action="store_true")
    parser.add_argument("--no-ragged", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    names = [n for n in PAIRS if not args.pairs or any(part in n for part in args.pairs.split(","))]
    result = {
        "machine": machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "plait": plait.__version__},
        "shapes": {"batch": args.batch, "length": args.length, "dim": DIM, "vocab": VOCAB, "dtype": "float32"},
        "rounds": args.rounds,
        "pairs": [compare(name, args.batch, args.length, args.rounds) for name in names],
    }
    if not args.no_ragged:
        result["ragged"] = ragged(args.rounds)
    if not args.no_products:
        result["step_over_products"] = {
            "batch": args.batch,
            "length": 512,
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "rows": step_over_products(args.batch, 512, args.rounds),
        }
    if not args.no_hybrids:
        result["hybrids"] = hybrids(args.batch, args.length, args.rounds)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
