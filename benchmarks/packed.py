"""Packed documents: attention's forms against float64, their times, and training steps beside whole rows.

    python benchmarks/packed.py [--device cuda] [--only attention,steps] [--out FILE.json]

Documents have lognormal lengths around a mean. Times are medians, of forward and backward together. A step is that of AdamW,
bfloat16 under autocast on a GPU, every batch of other documents; `graphs` counts what torch.compile made of them, and `waits`
how often forward and backward made the host wait for the device.
"""

import argparse
import json
import random
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import plait
from plait.evaluate.machine import machine
from plait.model import token_loss
from plait.ops.attention import attention
from plait.ops.kernels import forced
from plait.ops.packing import Packing

HEADS, KEYS, DIM = 16, 4, 64
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # some roundings of the largest value
DESIGNS = ("(AF)24", "((DF)3 AF)6", "((MF)3 AF)6", "((GF)3 AF)6")  # about 350M

CHECKED = (  # numbers of a key and of a value, window, prefix
    *((64, 64, None, 0), (64, 64, 100, 0), (64, 64, 100, 4), (12, 12, None, 0)),
    *((20, 20, 7, 0), (20, 20, 7, 30), (128, 128, 2, 0), (24, 40, None, 0), (24, 40, 7, 3)),
)


def documents(tokens: int, mean: int, seed: int = 0) -> list[int]:
    """Lengths that add up to `tokens`."""
    draw, lengths = random.Random(seed), []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, max(1, int(draw.lognormvariate(0, 1) * mean))))
    return lengths


def inputs(tokens: int, k: int, v: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    shapes = (1, tokens, HEADS, k), (1, tokens, KEYS, k), (1, tokens, KEYS, v)
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def with_gradients(run: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    y = run(*leaves)
    return [
        y.detach(),
        *torch.autograd.grad(y, leaves, torch.cos(torch.arange(y.numel(), device=y.device)).view_as(y).to(y)),
    ]


def check(device: str) -> dict[str, float]:
    """The largest error of outputs and gradients over the largest value, by form and dtype."""
    worst: dict[str, float] = {}
    lengths = [1, 66, 2, 64, 5, 300, 1, 129]
    packing = Packing.of_lengths(lengths, torch.device(device))
    for dtype, bound in BOUNDS.items():
        for k, v, window, prefix in CHECKED:
            torch.manual_seed(0)
            leaves = inputs(sum(lengths), k, v, dtype, device)
            wide = [x.detach().double().requires_grad_() for x in leaves]
            with forced("reference"):
                want = with_gradients(partial(attention, window=window, prefix=prefix, packing=packing), wide)
            got = with_gradients(partial(attention, window=window, prefix=prefix, packing=packing), leaves)
            error = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))
            name = f"{str(dtype)[6:]}, k {k}, v {v}, window {window}" + (f", prefix {prefix}" if prefix else "")
            worst[name] = error
            print(f"{name}: {error:.1e}{'' if error < bound else '  WRONG'}", flush=True)
    return worst


def median(run: Callable[[], Any], device: str, rounds: int = 10) -> float:
    times = []
    for _ in range(rounds + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def attention_times(device: str, tokens: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Milliseconds, by mean length: packed, one document after the other in autograd, and as many equal rows of that length."""
    found: dict[str, dict[str, float]] = {}
    leaves = inputs(tokens, DIM, DIM, dtype, device)
    streaming = {"window": 256, "prefix": 4, "sinks": torch.zeros(HEADS, device=device)}
    for mean in (64, 300, 2048):
        packing = Packing.of_lengths(documents(tokens, mean), torch.device(device))

        def packed(packing: Packing = packing, **how: Any) -> None:
            with_gradients(partial(attention, packing=packing, **how), leaves)

        def rows(mean: int = mean) -> None:
            q, k, v = (x.view(tokens // mean, mean, *x.shape[2:]).transpose(1, 2) for x in leaves)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            torch.autograd.grad(y, leaves, torch.ones_like(y))

        row = {"documents": packing.count, "packed": median(packed, device)}
        row["window 256"] = median(lambda packed=packed: packed(window=256), device)
        row["window 256, prefix 4, sinks"] = median(lambda packed=packed: packed(**streaming), device)
        with forced("chunked"):
            row["one by one"] = median(packed, device, 3)
            row["window 256, prefix 4, sinks, one by one"] = median(
                lambda packed=packed: packed(**streaming), device, 3
            )
        if tokens % mean == 0:
            row["equal rows"] = median(rows, device)
        found[str(mean)] = row
        print(f"mean length {mean}:", {name: round(x, 2) for name, x in row.items()}, flush=True)
    return found


def train(pattern: str, compiled: bool, tokens: int, rows: int, steps: int) -> dict[str, float]:
    """A training run of packed documents (`rows` 0) or of so many whole rows."""
    torch._dynamo.reset()
    layers = {"A": {"kind": "attention", "heads": HEADS, "kv_heads": KEYS, "head_dim": DIM}}
    design = plait.ModelConfig(vocab=32_000, dim=1024, pattern=pattern, layers=layers)
    model, counter = plait.build(design, device="cuda"), CompileCounterWithBackend("inductor")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if compiled:
        torch._dynamo.config.recompile_limit = 4 * len(model.slots)
        for slot in model.slots:
            slot.compile(backend=counter, fullgraph=True)
    times, waits, first = [], 0, perf_counter()
    for step in range(steps):
        ids = torch.randint(32_000, (max(rows, 1), tokens // max(rows, 1)), device="cuda")
        cuts = None if rows else torch.tensor([0, *accumulate(documents(tokens, 600, step))], dtype=torch.int32)
        torch.cuda.synchronize()
        start = perf_counter()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if step == steps - 1 else "default")
            with torch.autocast("cuda", torch.bfloat16):
                total, count = token_loss(model, ids, ids, cu_seqlens=cuts)
            (total / count).backward()
            torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchroniz" in str(w.message) for w in said)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(perf_counter() - start)
        if step == 2:
            first = perf_counter() - first
    found = {
        "tokens_per_s": tokens / statistics.median(times[3:]),
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30,
        "first_3_steps_s": first,
        "graphs": counter.frame_count,
        "waits": waits,
    }
    torch.cuda.reset_peak_memory_stats()
    print(f"{pattern}{', compiled' if compiled else ''}, {f'{rows} rows' if rows else 'packed'}:", found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="attention,steps")
    parser.add_argument("--designs", default=",".join(DESIGNS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device, found = arguments.device, {"machine": machine()}
    if "attention" in arguments.only:
        found["errors"] = check(device)
        small = device == "cpu"
        found["attention_ms"] = attention_times(
            device, 2048 if small else 16_384, torch.float32 if small else torch.bfloat16
        )
    if "steps" in arguments.only and device == "cuda":
        found["steps"] = {}
        for pattern in arguments.designs.split(","):
            for name, compiled, rows in (("packed", False, 0), ("packed, compiled", True, 0), ("rows", False, 4)):
                found["steps"][f"{pattern}, {name}"] = train(pattern, compiled, 16_384, rows, 14 if compiled else 8)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
