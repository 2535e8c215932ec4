"""Nonlinear recurrences on a CPU: chunks in parallel beside the loop over tokens, and beside torch.nn.LSTM.

python benchmarks/shooting_cpu.py --out benchmarks/results/shooting_cpu.json

One process, float32, medians of calls that take turns. Only the ratios mean anything on another machine.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.design.layers.recurrent import LSTM as LSTMConfig
from plait.evaluate.machine import machine
from plait.layers.recurrent import RecurrentCell
from plait.ops.shooting import GRU, LSTM, RNN, SLSTM, Bound, Cell, shooting

B, T, D = 1, 4096, 256
CELLS: dict[str, Cell] = {
    "RNN": RNN(),
    "GRU": GRU(),
    "LSTM": LSTM(),
    "ParaLSTM": LSTM(coupled=True, peephole=True),
    "sLSTM": SLSTM(),
}


def medians(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, one after the other in every round, the first round not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def diagonal(cell: Cell) -> tuple[Bound, Tensor]:
    g = len(cell.inputs)
    recurrent = (torch.randn(g, 1, D) / 4).clamp(-0.5, 0.5).requires_grad_()
    weights = tuple((torch.randn(1, D) / 4).clamp(-0.5, 0.5).requires_grad_() for _ in cell.weights)
    return cell.bind(recurrent, weights=weights), torch.randn(B, T, g, 1, D).requires_grad_()


def forward(run: Callable[[], Tensor]) -> Callable[[], Any]:
    def call() -> None:
        with torch.no_grad():
            run()

    return call


def both(run: Callable[[], Tensor]) -> Callable[[], Any]:
    return lambda: run().sum().backward()


def beside_the_loop(cell: Cell, rounds: int) -> dict[str, Any]:
    bound, x = diagonal(cell)
    row: dict[str, Any] = {}
    for name, how in (("forward", forward), ("forward and backward", both)):
        runs = {
            "parallel": how(lambda: shooting(bound, x)[0]),
            "loop": how(lambda: shooting(bound, x, solver="sequential")[0]),
        }
        row[name] = medians(runs, rounds)
        row[name]["ratio"] = row[name]["loop"] / row[name]["parallel"]
    info = shooting(bound, x)[2]
    return row | {"passes": int(info.passes), "gap": float(info.gap), "fell_back": bool(info.fell_back)}


def beside_torch(rounds: int) -> dict[str, float]:
    """Forward. The cells count their input projection, as torch.nn.LSTM does."""
    theirs, x = nn.LSTM(D, D, batch_first=True), torch.randn(B, T, D)
    cell = RecurrentCell(LSTMConfig(heads=1, head_dim=D), D)
    dense, (bound, inputs) = RecurrentCell.from_torch(theirs), diagonal(LSTM())
    runs = {
        "torch.nn.LSTM": lambda: theirs(x)[0],
        "diagonal LSTM, op": lambda: shooting(bound, inputs)[0],
        "diagonal LSTM, cell": lambda: cell(x)[0],
        "torch.nn.LSTM's weights, dense cell": lambda: dense(x)[0],
    }
    return medians({name: forward(run) for name, run in runs.items()}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    cells = {}
    for name, cell in CELLS.items():
        cells[name] = row = beside_the_loop(cell, args.rounds)
        ways = ", ".join(
            f"{way} {row[way]['parallel']:.1f} ms, {row[way]['ratio']:.1f}x"
            for way in ("forward", "forward and backward")
        )
        print(f"{name:10} {row['passes']} passes; {ways}", flush=True)
    peers = beside_torch(args.rounds)
    for name, ms in peers.items():
        print(f"{name:40} {ms:7.1f} ms  {peers['torch.nn.LSTM'] / ms:.1f}x")
    if args.out:
        head = {"device": "cpu", "machine": machine(), "torch": torch.__version__}
        shape = {"shape": f"B {B}, T {T}, D {D}, float32", "unit": "ms, medians"}
        args.out.write_text(
            json.dumps(head | shape | {"cells": cells, "peers": peers}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
