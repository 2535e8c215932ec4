"""Passes and time of every parallel solver of nonlinear recurrences, beside the loop over tokens, in one process.

    python benchmarks/solvers.py [--lengths 256,1024,4096,16384] [--out benchmarks/results/solvers.json]

Diagonal GRU, LSTM and ParaLSTM whose gates are biased to remember (0, 3, 6: about 2, 20, 400 tokens) and a dense tanh RNN
whose largest Lyapunov exponent is positive, so that no solver can be quick. One row of 32 units: a loop over tokens has
little to do at each of them, which is what parallel solvers are for. `shooting` and `sequential` are plait's own, Newton over
all tokens is `benchmarks/baselines`. All are forward only, to the same tolerance: for Newton that is the residual of each
token, for shooting the gap at the joints. A solver that is not there after so many passes (Newton 32, shooting its own limit)
runs the loop after all, which its time includes: "fell_back". `error` is the largest difference from the loop in float64.
Solvers take turns, round by round; times are medians.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from baselines import newton
from torch import Tensor

from plait.evaluate.machine import machine
from plait.ops.shooting import GRU, LSTM, RNN, Bound, shooting, torch_rnn

SOLVERS = ("shooting", *newton.SOLVERS, "sequential")
LENGTHS, BIASES = (256, 1024, 4096, 16_384), (0, 3, 6)
UNITS, TOLERANCE, PASSES = 32, 1e-6, 32
PATIENCE = 10.0  # seconds for the rounds of one solver after its first: the slow ones take tens of seconds a call
CHAOS = 3.0  # gain of the dense RNN: without inputs chaos begins at 1, inputs of size 1 calm it


def cells() -> Iterator[tuple[str, Bound]]:
    """Names and cells in float64; inputs are N(0, 1), so that gates scatter around their bias."""
    gated = {"GRU": (GRU(), "z", -1), "LSTM": (LSTM(), "f", 1), "ParaLSTM": (LSTM(coupled=True, peephole=True), "f", 1)}
    for bias in BIASES:
        for name, (cell, gate, sign) in gated.items():
            g = len(cell.inputs)
            biases = torch.zeros(g, 1, UNITS, dtype=torch.float64)
            biases[cell.inputs.index(gate)] = sign * bias
            weights = tuple(0.5 * torch.randn(1, UNITS).double() for _ in cell.weights)
            recurrent = 0.5 * torch.randn(g, 1, UNITS).double()
            yield f"{name} remembers {bias}", cell.bind(recurrent, bias=biases, weights=weights)
    yield "RNN dense chaotic", RNN().bind(CHAOS * UNITS**-0.5 * torch.randn(1, 1, UNITS, UNITS).double())


def lyapunov(cell: Bound, x: Tensor) -> float:
    """The largest exponent per token, from how fast a neighbour leaves; positive is chaotic. x (1, t, g, h, k)."""
    size, total = 1e-7, 0.0
    s = cell.cell.start_like(x, 1)
    near = s + size * torch.randn_like(s) / s.numel() ** 0.5
    for token in x.unbind(1):
        s, near = cell.step(token, s), cell.step(token, near)
        apart = float((near - s).norm())
        total += math.log(apart / size)
        near = s + (near - s) * (size / apart)
    return total / x.shape[1]


def call(cell: Bound, x: Tensor, solver: str) -> tuple[Tensor, dict[str, Any], float]:
    """Outputs, how it was solved, milliseconds."""
    start = time.perf_counter()
    h, passes, gap, fell_back = (by_newton if solver in newton.SOLVERS else by_plait)(cell, x, solver)
    record = {"passes": int(passes), "gap": float(gap), "fell_back": bool(fell_back)}
    return h, record, (time.perf_counter() - start) * 1e3


def by_plait(cell: Bound, x: Tensor, solver: str) -> tuple[Tensor, Any, Any, Any]:
    h, _, info = shooting(cell, x, solver=solver, tol=TOLERANCE)
    return h, *info


def by_newton(cell: Bound, x: Tensor, solver: str) -> tuple[Tensor, Any, Any, Any]:
    first = cell.cell.start_like(x, len(x))
    states, passes, gap = newton.solve(cell, x, first, solver, TOLERANCE, PASSES)
    if gap <= TOLERANCE:
        return states[:, :, 0], passes, gap, False
    torchs = torch_rnn.supports(cell)  # what shooting falls back to
    h = torch_rnn.run(cell, x, first, None)[0] if torchs else shooting(cell, x, solver="sequential")[0]
    return h, passes, gap, True


def compare(cell: Bound, x: Tensor, want: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """One record per solver."""
    rows, times = {}, {}
    for solver in SOLVERS:
        call(cell, x[:, :32], solver)  # what is set up once is not what is measured
        h, rows[solver], first = call(cell, x, solver)
        rows[solver]["error"] = float((h.double() - want).abs().max())
        times[solver] = [first]
    for _ in range(rounds - 1):
        for solver, spent in times.items():
            if sum(spent) + spent[0] < PATIENCE * 1e3:
                spent.append(call(cell, x, solver)[2])
    for solver, spent in times.items():
        rows[solver] |= {"ms": statistics.median(spent), "rounds": len(spent)}
    return rows


def line(solver: str, row: dict[str, Any]) -> str:
    passes = f"{row['passes']}{'*' if row['fell_back'] else ''}"
    return f"{solver} {passes} / {row['ms']:.0f}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = {"batch": 1, "units": UNITS, "tolerance": TOLERANCE, "most_passes": PASSES}
    result = {"torch": torch.__version__, "device": "cpu", "machine": machine(), **shape, "cases": []}
    print(f"passes / ms, * fell back to the loop; {shape}")
    for title, cell in cells():
        g, h, k = cell.recurrent.shape[:3]
        inputs = torch.randn(1, max(args.lengths), g, h, k).double()
        exponent = lyapunov(cell, inputs[:, :1024])
        for length in args.lengths:
            want = shooting(cell, inputs[:, :length], solver="sequential")[0]
            for dtype in (torch.float32, torch.float64):
                bound = cell.with_tensors([w.to(dtype) for w in cell.tensors()])
                rows = compare(bound, inputs[:, :length].to(dtype), want, args.rounds)
                kind = str(dtype).removeprefix("torch.")
                case = {"cell": title, "lyapunov": exponent, "length": length, "dtype": kind, "solvers": rows}
                result["cases"].append(case)
                print(
                    f"{title} ({exponent:+.2f}), {length}, {kind}: " + ", ".join(line(*row) for row in rows.items()),
                    flush=True,
                )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
