"""8 experts, 2 for each token, beside one SwiGLU of as many active parameters: a layer's forward and backward over 2,048 tokens
on a CPU, in one process and one thread.

    python benchmarks/experts.py --out benchmarks/results/experts.json
"""

import argparse
import json
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

import plait
from plait.evaluate.machine import machine
from plait.layers import context_for

TOKENS, ROUNDS = 2_048, 15
SIZES = {256: 384, 512: 704, 768: 1_024}  # width of the model, and of an expert


def layer(config: plait.Layer, dim: int) -> Any:
    return plait.build(plait.ModelConfig(vocab=64, dim=dim, pattern="L", layers={"L": config})).slots[0].mixer


def timed(module: nn.Module, x: Tensor) -> float:
    """Milliseconds of the processor, which other work on the machine does not lengthen: all is done in one thread."""
    started = process_time()
    y, _ = module(x, context_for(x), None)
    y.backward(torch.ones_like(y))
    took = 1e3 * (process_time() - started)
    module.zero_grad(set_to_none=True)
    return took


def measure() -> list[dict[str, Any]]:
    """The least of ROUNDS, dense and experts in turn."""
    torch.set_num_threads(1)
    rows = []
    for dim, hidden in SIZES.items():
        x = torch.randn(1, TOKENS, dim, requires_grad=True)
        dense, experts = layer(plait.SwiGLU(hidden=2 * hidden), dim), layer(plait.MixtureOfExperts(hidden=hidden), dim)
        times = [(timed(dense, x), timed(experts, x)) for _ in range(ROUNDS)]
        dense_ms, experts_ms = (min(column) for column in zip(*times, strict=True))
        row = {"dim": dim, "hidden": hidden, "dense_ms": dense_ms, "experts_ms": experts_ms}
        rows.append(row | {"ratio": experts_ms / dense_ms})
        print(rows[-1])
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result = {"machine": machine(), "tokens": TOKENS, "rows": measure()}
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
