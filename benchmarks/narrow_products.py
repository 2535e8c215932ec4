"""A prompt read in 16 bits on a CPU, as plait multiplies and as torch does by itself, beside float32; seconds of the processor.

    python benchmarks/narrow_products.py --out benchmarks/results/narrow_products.json

A model of SmolLM2's shape with random weights, one thread. Where the processor has instructions for a dtype, both are torch's.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import plait
from plait.engine.prefill import prefill
from plait.evaluate.machine import machine
from plait.ops import products

LAYERS = {"A": plait.Attention(heads=9, kv_heads=3), "F": plait.SwiGLU(hidden=1536)}
DESIGN = plait.ModelConfig(vocab=49_152, dim=576, pattern="(AF)30", layers=LAYERS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def seconds(model: plait.LanguageModel, tokens: int, rounds: int) -> float:
    """Of the processor, in the middle of `rounds`."""
    prompts, times = [list(range(tokens))], []
    with torch.inference_mode():
        for _ in range(1 + rounds):
            started = time.process_time()
            prefill(model, prompts, 1)
            times.append(time.process_time() - started)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, widened, rows = plait.build(DESIGN).eval(), dict(products.SLOW), []
    for dtype in DTYPES:
        model, found = model.to(dtype), {"dtype": str(dtype).removeprefix("torch."), "tokens": options.tokens}
        for name, slow in (("plait", widened), ("torch", {})):
            products.SLOW.clear()
            products.SLOW.update(slow)
            found[f"{name}_s"] = seconds(model, options.tokens, options.rounds)
        rows.append(found)
        print(f"{found['dtype']:9} {found['plait_s']:6.2f} s, torch's products {found['torch_s']:6.2f} s", flush=True)
    if options.out:
        text = json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n"
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
