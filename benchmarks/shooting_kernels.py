"""Diagonal recurrences on a GPU, every shape of kernel: right against a float64 loop, and how fast.

    python benchmarks/shooting_kernels.py [--plans sequential,grid] [--cells gru,...] [--out FILE.json]

A plan may carry numbers: `grid:L=512:W=64:U=8`. Times are medians of triton's `do_bench`, in milliseconds, of kernels and
the few launches around them; the floor is what must be read and written at 3.0 TB/s. Errors are relative to the largest
value: `error` against the loop (the first tokens, 64 channels), `apart` from the sequential kernel everywhere.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from plait.ops.shooting import reference, triton
from plait.ops.shooting.cells import GRU, LSTM, RNN, SLSTM, Bound, Cell
from plait.ops.shooting.triton.plan import GRID, SEQUENTIAL, Plan

CELLS: dict[str, Cell] = {
    "gru": GRU(),
    "lstm coupled peephole": LSTM(coupled=True, peephole=True),
    "lstm": LSTM(),
    "rnn": RNN(),
    "slstm": SLSTM(),
}
SHAPES = ((8, 4096, 2048), (1, 32768, 2048), (1, 131072, 256), (32, 2048, 2048))  # batch, tokens, units
BANDWIDTH = 3.0e12
CHECKED_TOKENS, CHECKED_UNITS = 2048, 64
BASES = {"sequential": SEQUENTIAL, "grid": GRID}


class Problem:
    def __init__(self, cell: Cell, b: int, t: int, d: int, bias: float) -> None:
        torch.manual_seed(0)
        g, s = len(cell.inputs), len(cell.states)
        self.x = torch.randn(b, t, g, 1, d, device="cuda").bfloat16()
        self.x[:, :, 0] += bias
        start = torch.tensor(cell.start, device="cuda").view(1, s, 1, 1)
        self.h0 = start.expand(b, s, 1, d).contiguous()
        weights = tuple(torch.randn(1, d, device="cuda") / 2 for _ in cell.weights)
        self.bound = cell.bind(torch.randn(g, 1, d, device="cuda") / 2, weights=weights)
        self.dh = torch.randn(b, t, 1, d, device="cuda").bfloat16()
        self.dfinal = torch.randn(b, s, 1, d, device="cuda")

    def forward(self, tol: float, passes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return triton.forward(self.bound, self.x, self.h0, None, tol, passes)

    def backward(
        self, h: Tensor, rest: Tensor, dh: Tensor, dfinal: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        return triton.backward(self.bound, self.x, self.h0, h, rest, dh, dfinal, None)

    def floors(self) -> tuple[float, float]:
        """Milliseconds that memory needs for forward, and for forward and backward."""
        h = self.dh.nbytes
        rest = 2 * h * (len(self.bound.cell.states) - 1)
        there, back = self.x.nbytes + h + rest, 2 * self.x.nbytes + 2 * h + rest
        return 1e3 * there / BANDWIDTH, 1e3 * (there + back) / BANDWIDTH

    def loop(self) -> tuple[list[Tensor], slice]:
        """h, and the gradients at x and at the weights, of the first tokens and channels, in float64 on the host."""
        tokens = slice(min(CHECKED_TOKENS, self.x.shape[1]))
        some = slice(CHECKED_UNITS)
        x, h0 = self.x[:, tokens, ..., some], self.h0[..., some]
        leaves = [z.double().cpu().requires_grad_() for z in (x, *(w[..., some] for w in self.bound.tensors()))]
        bound = Bound(self.bound.cell, leaves[1], None, tuple(leaves[2:]))
        states, _ = reference.run(bound, leaves[0], h0.double().cpu(), None)
        loss = (states[:, :, 0] * self.dh[:, tokens, ..., some].cpu()).sum()
        return [states[:, :, 0].detach(), *torch.autograd.grad(loss, leaves)], tokens


def apart(got: Tensor, want: Tensor) -> float:
    got, want = got.to(want.device, torch.float32), want.float()
    return float((got - want).abs().max() / want.abs().max())


def errors(problem: Problem, want: list[Tensor], tokens: slice, tol: float, passes: int) -> list[float]:
    h, rest, _, _ = problem.forward(tol, passes)
    dh = torch.zeros_like(problem.dh)
    dh[:, tokens] = problem.dh[:, tokens]
    dx, _, weights = problem.backward(h, rest, dh, None)
    got = [h[:, tokens], dx[:, tokens], *weights]
    return [apart(one[..., :CHECKED_UNITS], truth) for one, truth in zip(got, want, strict=True)]


def parsed(text: str, problem: Problem) -> Plan:
    kind, *numbers = text.split(":")
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    b, t, _, _, d = problem.x.shape
    if kind == "auto":
        return triton.plan(b, d, t, sms)
    chosen = triton.plan(1, d, b * t, sms) if kind == "grid" else BASES[kind]
    chosen = chosen if chosen.kind == kind else BASES[kind]._replace(L=256)
    return chosen._replace(**{name: int(value) for name, value in (n.split("=") for n in numbers)})


def measure(problem: Problem, plan: Plan, truth: tuple[list[Tensor], slice], tol: float, passes: int) -> dict[str, Any]:
    with triton.forced_plan(SEQUENTIAL):
        want = problem.forward(tol, passes)[0]
    with triton.forced_plan(plan):
        h, rest, _, info = problem.forward(tol, passes)
        row = {"error": errors(problem, *truth, tol, passes), "apart": apart(h, want), "info": info.tolist()}

        def both() -> None:
            h, rest, _, _ = problem.forward(tol, passes)
            problem.backward(h, rest, problem.dh, problem.dfinal)

        row["forward"] = do_bench(lambda: problem.forward(tol, passes), return_mode="median")
        row["both"] = do_bench(both, return_mode="median")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", default="sequential,grid")
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--shapes", default=",".join(map(str, range(len(SHAPES)))), help="numbers of the shapes")
    parser.add_argument("--bias", type=float, default=0.0, help="added to the first gate: -6 is a long memory in a GRU")
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.cells.split(","):
        for shape in (SHAPES[int(i)] for i in options.shapes.split(",")):
            problem = Problem(CELLS[name], *shape, options.bias)
            floors, truth = problem.floors(), problem.loop()
            for text in options.plans.split(","):
                plan = parsed(text, problem)
                found = measure(problem, plan, truth, options.tol, options.passes)
                rows.append({"cell": name, "shape": shape, "plan": plan._asdict(), "floors": floors} | found)
                print(
                    f"{name:22} {shape!s:18} {text:20} forward {found['forward']:6.3f} (floor {floors[0]:.3f})"
                    f"  both {found['both']:6.3f} (floor {floors[1]:.3f})  passes {found['info'][0]:.0f}"
                    f" gap {found['info'][1]:.1e} fell back {found['info'][2]:.0f}"
                    f"  errors {' '.join(f'{e:.0e}' for e in found['error'])}  apart {found['apart']:.0e}",
                    flush=True,
                )
                if options.out:
                    options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
