"""Decoding on a pool: a step from tokens to tokens, captured in a graph on a GPU; checked, then timed.

    python benchmarks/decode.py --out benchmarks/results/decode_h100.json [--patterns "(AF)24,..."] [--profile]

Models of about 350M parameters, width 1024, vocabulary 32,000, bfloat16. For each: a replayed step gives the tokens of one that
is run, nothing in it asks the device (`torch.cuda.set_sync_debug_mode`), then the median time of a step at a batch and context.
The floor is what must be read: weights, and the state of every row, over the card's bandwidth as a large copy measures it.
Last, 100 prompts of 1,024 tokens at once, 1,024 new ones each, as `plait.engine.generate_tokens` does it, reading included.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import plait
from plait.engine import Sampling, generate_tokens
from plait.engine.step import Step
from plait.evaluate.clock import seconds
from plait.evaluate.decoding import decode_speed, remembering, stepping
from plait.evaluate.kernels import kernels
from plait.evaluate.limits import Limits, limits
from plait.evaluate.machine import machine
from plait.state import ModelState, PoolRows

VOCAB, DIM = 32_000, 1024
PATTERNS = ("(AF)24", "((DF)3 AF)6", "((MF)3 AF)6", "((GF)3 AF)6")
CASES = ((1, 64), (1, 16_384), (32, 64))  # rows, tokens that each has seen
STREAMS, READ, WRITTEN = 100, 1024, 1024
CHECKED, TIMED, EAGER = 24, 200, 10


def not_replayed(step: Step, at: PoolRows) -> torch.Tensor:
    step.pool.reserve(at.rows, 1)
    tokens = step.run(at)
    step.pool.advance(at.rows, 1)
    return tokens


def check(model: plait.LanguageModel, state: ModelState, context: int, sampling: Sampling) -> None:
    """Replayed steps are steps: the same tokens, and no question to the device."""
    (replayed, at), (run, beside) = (stepping(model, state, context + 3 * CHECKED, sampling) for _ in range(2))
    replayed(at), not_replayed(run, beside)  # captured; kernels compiled
    for _ in range(CHECKED):
        torch.cuda.set_sync_debug_mode("error")
        try:
            want, got = not_replayed(run, beside), replayed(at)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if not torch.equal(want, got):
            raise SystemExit(f"WRONG: replayed {got.tolist()[:8]}, run {want.tolist()[:8]}")


def measure(model: plait.LanguageModel, rows: int, context: int, can: Limits) -> dict[str, Any]:
    state = remembering(model, rows, context)
    for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.9)):
        check(model, state, context, sampling)
    speed = decode_speed(model, rows, context, can, TIMED)
    step, at = stepping(model, state, context + 3 * EAGER)
    eager = seconds(lambda: not_replayed(step, at), model.device, EAGER)
    return {
        "rows": rows,
        "context": context,
        "ms": speed.ms,
        "worst_ms": speed.worst_ms,
        "not_captured_ms": 1e3 * statistics.median(eager),
        "capture_s": speed.first_s,
        "floor_ms": speed.floor_ms,
        "pool_bytes": step.pool.nbytes,
    }


def streams(model: plait.LanguageModel) -> dict[str, Any]:
    """Tokens a second that come out of all streams together, and how long the first one was waited for."""
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(VOCAB, (STREAMS, READ), generator=random).tolist()
    generate_tokens(model, prompts, max_tokens=3)  # kernels compiled
    (first,) = seconds(lambda: generate_tokens(model, prompts, max_tokens=1), model.device, 1)
    (whole,) = seconds(lambda: generate_tokens(model, prompts, max_tokens=WRITTEN), model.device, 1)
    return {
        "rows": STREAMS,
        "prompt": READ,
        "written": WRITTEN,
        "first_s": first,
        "seconds": whole,
        "tokens_s": STREAMS * WRITTEN / whole,
    }


def profile(model: plait.LanguageModel) -> None:
    """The kernels of one step, by time."""
    step, at = stepping(model, remembering(model, 1, 64), 128)
    step(at)
    rows = kernels(lambda: step(at), model.device, 10)
    print(
        f"  {1e3 * sum(row.ms for row in rows):.0f} us of kernels a step, {sum(row.calls for row in rows):.0f} launches"
    )
    for row in rows[:22]:
        print(f"  {1e3 * row.ms:8.1f} us {row.calls:6.0f} x  {row.name[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    can, results = limits(torch.device("cuda"), torch.bfloat16), []
    print(f"{torch.cuda.get_device_name()}: copies at {can.copies / 1e12:.2f} TB/s")
    for pattern in args.patterns.split(","):
        model = plait.build(
            plait.ModelConfig(vocab=VOCAB, dim=DIM, pattern=pattern), device="cuda", dtype=torch.bfloat16
        ).eval()
        size = sum(p.numel() for p in model.parameters())
        with torch.inference_mode():
            for rows, context in CASES:
                row = {"pattern": pattern, "parameters": size} | measure(model, rows, context, can)
                results.append(row)
                print(
                    f"{pattern:14} {size / 1e6:5.0f}M  batch {rows:3} context {context:6}  {row['ms']:6.2f} ms (worst "
                    f"{row['worst_ms']:.2f}, floor {row['floor_ms']:.2f}, not captured {row['not_captured_ms']:.1f}, "
                    f"capture {row['capture_s']:.1f} s)",
                    flush=True,
                )
            row = {"pattern": pattern, "parameters": size} | streams(model)
            results.append(row)
            print(
                f"{pattern:14} {STREAMS} streams of {READ:,} and {WRITTEN:,} tokens: {row['tokens_s']:,.0f} tokens/s, "
                f"{row['seconds']:.2f} s, the first token after {row['first_s']:.2f} s",
                flush=True,
            )
            if args.profile:
                profile(model)
        del model
        torch.cuda.empty_cache()
    if args.out:
        result = {"machine": machine(), "torch": torch.__version__, "bandwidth": can.copies, "results": results}
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
