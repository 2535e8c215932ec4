"""Decoding on a pool: a step from tokens to tokens, captured in a graph on a GPU; checked, then timed.

    python benchmarks/decode.py --out benchmarks/results/decode_h100.json [--patterns "(AF)24,..."] [--profile]

Models of about 350M parameters, width 1024, vocabulary 32,000, bfloat16. For each: a replayed step gives the tokens of one that
is run, nothing in it asks the device (`torch.cuda.set_sync_debug_mode`), then the median time of a step at a batch and context.
The floor is what must be read: weights, and the state of every row, over the card's bandwidth as a large copy measures it.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import plait
from plait.engine import Sampling
from plait.engine.step import Step
from plait.evaluate.machine import machine
from plait.state import ModelState, PoolRows

VOCAB, DIM = 32_000, 1024
PATTERNS = ("(AF)24", "((DF)3 AF)6", "((MF)3 AF)6", "((GF)3 AF)6")
CASES = ((1, 64), (1, 16_384), (32, 64))  # rows, tokens that each has seen
CHECKED, TIMED = 24, 200


def bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    times = []
    for _ in range(8):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        y.copy_(x)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * x.nbytes / statistics.median(times)


def after(model: plait.LanguageModel, rows: int, context: int) -> ModelState:
    """What `rows` rows remember after `context` random tokens each."""
    states = []
    for seed in range(rows):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(VOCAB, (1, context), generator=generator).cuda()
        state = model.init_state(1, context)
        for chunk in tokens.split(2048, 1):
            _, state = model.features(chunk, state)
        states.append(state)
    return ModelState.join(states)


def stepping(model: plait.LanguageModel, state: ModelState, context: int, sampling: Sampling) -> tuple[Step, Any]:
    pool = model.init_pool(state.batch, context + CHECKED + 3 * TIMED, page=256)
    rows = pool.join(state)
    return Step(model, pool, [sampling] * len(rows), range(len(rows))), pool.at(rows)


def not_replayed(step: Step, at: PoolRows) -> torch.Tensor:
    step.pool.reserve(at.rows, 1)
    tokens = step.run(at)
    step.pool.advance(at.rows, 1)
    return tokens


def check(model: plait.LanguageModel, state: ModelState, context: int, sampling: Sampling) -> None:
    """Replayed steps are steps: the same tokens, and no question to the device."""
    (replayed, at), (run, beside) = (stepping(model, state, context, sampling) for _ in range(2))
    replayed(at), not_replayed(run, beside)  # captured; kernels compiled
    for _ in range(CHECKED):
        torch.cuda.set_sync_debug_mode("error")
        try:
            want, got = not_replayed(run, beside), replayed(at)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if not torch.equal(want, got):
            raise SystemExit(f"WRONG: replayed {got.tolist()[:8]}, run {want.tolist()[:8]}")


def measure(model: plait.LanguageModel, rows: int, context: int, speed: float) -> dict[str, Any]:
    state = after(model, rows, context)
    for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.9)):
        check(model, state, context, sampling)
    started = time.perf_counter()
    step, at = stepping(model, state, context, Sampling())
    bytes_read = sum(p.nbytes for p in model.parameters()) - (0 if model.lm_head is None else model.embed.weight.nbytes)
    bytes_read += sum(x.nbytes for x in state.tensors().values())
    step(at)
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    times = []
    for _ in range(TIMED):
        begun = time.perf_counter()
        step(at)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    eager = []
    for _ in range(10):
        begun = time.perf_counter()
        not_replayed(step, at)
        torch.cuda.synchronize()
        eager.append(1e3 * (time.perf_counter() - begun))
    return {
        "rows": rows,
        "context": context,
        "ms": statistics.median(times),
        "worst_ms": max(times),
        "not_captured_ms": statistics.median(eager),
        "capture_s": first,
        "floor_ms": 1e3 * bytes_read / speed,
        "pool_bytes": step.pool.nbytes,
    }


def profile(model: plait.LanguageModel) -> None:
    """The kernels of one step, by time."""
    step, at = stepping(model, after(model, 1, 64), 64, Sampling())
    step(at)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(10):
            step(at)
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_device_time_total)
    total = sum(row.self_device_time_total for row in rows)
    print(f"  {total / 10:.0f} us of kernels a step, {sum(row.count for row in rows) / 10:.0f} launches")
    for row in rows[:22]:
        print(f"  {row.self_device_time_total / 10:8.1f} us {row.count / 10:6.0f} x  {row.key[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    speed, results = bandwidth(), []
    print(f"{torch.cuda.get_device_name()}: copies at {speed / 1e12:.2f} TB/s")
    for pattern in args.patterns.split(","):
        model = plait.build(
            plait.ModelConfig(vocab=VOCAB, dim=DIM, pattern=pattern), device="cuda", dtype=torch.bfloat16
        ).eval()
        size = sum(p.numel() for p in model.parameters())
        with torch.inference_mode():
            for rows, context in CASES:
                row = {"pattern": pattern, "parameters": size} | measure(model, rows, context, speed)
                results.append(row)
                print(
                    f"{pattern:14} {size / 1e6:5.0f}M  batch {rows:3} context {context:6}  {row['ms']:6.2f} ms (worst "
                    f"{row['worst_ms']:.2f}, floor {row['floor_ms']:.2f}, not captured {row['not_captured_ms']:.1f}, "
                    f"capture {row['capture_s']:.1f} s)",
                    flush=True,
                )
            if args.profile:
                profile(model)
        del model
        torch.cuda.empty_cache()
    if args.out:
        result = {"machine": machine(), "torch": torch.__version__, "bandwidth": speed, "results": results}
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
