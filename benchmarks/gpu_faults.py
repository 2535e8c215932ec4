"""What plait 0.1 did badly on a GPU, measured: decoding over growing keys, the first call at a new length, and compiled
bfloat16 training.

    python benchmarks/gpu_faults.py --out benchmarks/results/gpu_faults.json
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import plait
from plait.data import Batch
from plait.evaluate.machine import machine
from plait.model import NextToken
from plait.train.step import backward

VOCAB, DIM = 32_000, 1024
DECODE = {"transformer": "(AF)12", "hybrid": "((DF)3 AF)3", "recurrent": "((GF)3 AF)3"}


def milliseconds(run: Any) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def decoding(pattern: str, tokens: int = 200) -> dict[str, float]:
    """Single tokens over growing keys, as a text is written: median and worst of the last ones."""
    design = plait.ModelConfig(vocab=VOCAB, dim=DIM, pattern=pattern)
    model = plait.build(design, device="cuda", dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        _, state = model(torch.randint(VOCAB, (1, 1024), device="cuda"), model.init_state(1, 2048))
        token, times = torch.zeros(1, 1, dtype=torch.long, device="cuda"), []
        for _ in range(tokens):

            def forward() -> None:
                nonlocal state
                _, state = model(token, state)

            times.append(milliseconds(forward))
    late = times[tokens // 4 :]
    return {"median_ms": statistics.median(late), "worst_ms": max(late)}


def new_lengths(pattern: str = "(GF)4") -> list[dict[str, float]]:
    """The first and second reading of prompts of lengths that were never read before."""
    design = plait.ModelConfig(vocab=VOCAB, dim=DIM, pattern=pattern)
    model = plait.build(design, device="cuda", dtype=torch.bfloat16).eval()
    rows = []
    with torch.inference_mode():
        for length in (512, 1_000, 3_001, 8_192, 16_384, 12_345):
            tokens = torch.randint(VOCAB, (1, length), device="cuda")
            read = partial(model.features, tokens)
            first, second = (milliseconds(partial(read, model.init_state(1))) for _ in range(2))
            rows.append({"length": length, "first_ms": first, "second_ms": second})
    return rows


def step(objective: NextToken, optimizer: torch.optim.Optimizer, batch: Batch, losses: list[float]) -> None:
    losses.append(backward(objective, batch, 1, "bfloat16").item())
    optimizer.step()
    optimizer.zero_grad()


def compiled(pattern: str, steps: int = 6) -> dict[str, Any]:
    """Training under autocast with every slot compiled, against the same without: losses, and step time."""
    losses: dict[str, list[float]] = {}
    times: dict[str, float] = {}
    for name in ("eager", "compiled"):
        model = plait.build(plait.ModelConfig(vocab=1_000, dim=512, pattern=pattern), device="cuda")
        if name == "compiled":
            for slot in model.slots:
                slot.compile()
        optimizer, objective = torch.optim.AdamW(model.parameters(), lr=1e-3), NextToken(model)
        generator, losses[name], taken = torch.Generator().manual_seed(0), [], []
        for _ in range(steps):
            tokens = torch.randint(1_000, (1, 4_097), generator=generator)
            batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.tensor([0, 4_096], dtype=torch.int32), 0)
            taken.append(milliseconds(partial(step, objective, optimizer, batch, losses[name])))
        times[name] = statistics.median(taken[2:])
    gap = max(abs(a / b - 1) for a, b in zip(losses["compiled"], losses["eager"], strict=True))
    return {"pattern": pattern, "step_ms": times, "largest_relative_difference_of_losses": gap}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    data: dict[str, Any] = {
        "machine": machine(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "shapes": f"bfloat16, dim {DIM}, batch 1, after 1,024 tokens",
        "decoding": {name: {"pattern": p, **decoding(p)} for name, p in DECODE.items()},
        "new_lengths": new_lengths(),
    }
    data["compiled"] = []
    for pattern in ("(DF)2", "(MF)2", "(AF)2"):
        try:
            data["compiled"].append(compiled(pattern))
        except Exception as error:  # what fails is the finding
            data["compiled"].append({"pattern": pattern, "error": f"{type(error).__name__}: {str(error)[:300]}"})
    for name in ("decoding", "new_lengths", "compiled"):
        rows = data[name].values() if isinstance(data[name], dict) else data[name]
        print(name, *rows, sep="\n  ")
    if asked.out:
        asked.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
