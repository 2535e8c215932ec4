"""Activation checkpointing on a CPU: what a forward pass keeps for the backward one, and how long a step takes.

    python benchmarks/recompute.py [--rounds 9] [--out benchmarks/results/recompute.json]

Nothing computed again, what is cheap, and whole slots, turn by turn in one process: float32, 2 x 1,024 tokens, width 256,
without torch.compile. Memory is what torch's allocator holds after the forward pass, the logits left out; times are medians,
and count beside each other alone.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import plait
from plait.evaluate.machine import machine
from plait.model import token_loss

DESIGNS = ("(AF)4", "(DF)3 AF", "(MF)3 AF", "([M|A]F)4", "(GF)3 AF")
CHOICES = {"nothing": False, "cheap": "cheap", "slots": True}
SHAPE = {"batch": 2, "length": 1024, "dim": 256, "vocab": 64}


def kept(model: plait.LanguageModel, tokens: torch.Tensor) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        logits = model(tokens)[0]
    return sum(event.self_cpu_memory_usage for event in seen.key_averages()) - logits.nbytes


def step_seconds(model: plait.LanguageModel, tokens: torch.Tensor) -> float:
    started = time.perf_counter()
    total, count = token_loss(model, tokens[:, :-1], tokens[:, 1:])
    (total / count).backward()
    model.zero_grad()
    return time.perf_counter() - started


def measure(pattern: str, rounds: int) -> dict[str, Any]:
    model = plait.build(plait.ModelConfig(vocab=SHAPE["vocab"], dim=SHAPE["dim"], pattern=pattern))
    tokens = torch.randint(SHAPE["vocab"], (SHAPE["batch"], SHAPE["length"] + 1))
    memory, times = dict[str, int](), {name: list[float]() for name in CHOICES}
    for turn in range(rounds + 1):
        for name, choice in CHOICES.items():
            model.activation_checkpointing = choice
            if turn == 0:  # which warms up, too
                memory[name] = kept(model, tokens[:, 1:])
            else:
                times[name].append(step_seconds(model, tokens))
    return {
        "pattern": pattern,
        "kept_bytes": memory,
        "step_s": {name: statistics.median(t) for name, t in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "recompute.json")
    options = parser.parse_args()
    rows = []
    for pattern in DESIGNS:
        rows.append(row := measure(pattern, options.rounds))
        first = row["step_s"]["nothing"]
        cells = [
            f"{name} {row['kept_bytes'][name] / 2**20:6.1f} MiB {row['step_s'][name] / first:.2f}x" for name in CHOICES
        ]
        print(f"{pattern:12}", "   ".join(cells), flush=True)
    result = {"machine": machine(), "shape": SHAPE, "rounds": options.rounds, "rows": rows}
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
