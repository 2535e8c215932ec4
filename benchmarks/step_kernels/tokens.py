"""A token on the rows of a pool: recurrences, convolutions and cells."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops import conv, delta, shooting
from plait.ops import ssd as ssd_room
from plait.ops.conv import triton as conv_step
from plait.ops.delta import gated_delta
from plait.ops.delta import triton as delta_step
from plait.ops.kernels import forced
from plait.ops.rms_norm import l2norm
from plait.ops.shooting.triton import step as cell_step
from plait.ops.ssd import ssd
from plait.ops.ssd import triton as ssd_step
from step_kernels.measuring import BF16, DEVICE, FP32, LIMITS, Case, Run, Sets, apart, require


@dataclass(frozen=True)
class Step:
    """One op on b rows of a pool. `sizes`: of "delta" and "ssd" heads, key heads, key and value; of "conv" channels and width;
    of a cell heads and units."""

    op: str
    b: int
    sizes: tuple[int, ...]
    dtype: torch.dtype = BF16

    def __str__(self) -> str:
        return f"b {self.b} of {' x '.join(map(str, self.sizes))}, {str(self.dtype).removeprefix('torch.')}"


class Token:
    """A call of such a step: `kernel` in place, `truth` in float64, `torch` what plait's torch forms do. The inputs of a call
    are cut out of one projection, the pool's rows in no order."""

    def __init__(self, step: Step, seed: int = 0) -> None:
        self.step, self.generator = step, torch.Generator(DEVICE).manual_seed(seed)
        self.rows = torch.randperm(step.b + 3, device=DEVICE, generator=self.generator)[: step.b]
        getattr(self, step.op if step.op in ("conv", "delta", "ssd") else "cell")(*step.sizes)

    def normal(self, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return torch.randn(*shape, device=DEVICE, generator=self.generator, dtype=dtype)

    def cut(self, heads: int, *sizes: int) -> list[Tensor]:
        parts = self.normal(self.step.b, 1, heads * sum(sizes) + 16, dtype=self.step.dtype)[..., 16:]
        return [x.unflatten(2, (heads, -1)) for x in parts.split_with_sizes([heads * size for size in sizes], 2)]

    def form(self, name: str, op: Callable[..., Any], *inputs: Any) -> Run:
        """The op by this form of it."""

        def run() -> Any:
            with forced(name):
                return op(*inputs, state=self.state, rows=self.rows)

        return run

    def delta(self, h: int, g: int, k: int, v: int) -> None:
        self.linear(delta, delta_step, gated_delta, h, g, k, v)

    def ssd(self, h: int, g: int, k: int, v: int) -> None:
        self.linear(ssd_room, ssd_step, ssd, h, g, k, v)

    def linear(self, room: Any, kernel: Any, op: Callable[..., Any], h: int, g: int, k: int, v: int) -> None:
        (q, keys), (values,), b = self.cut(g, k, k), self.cut(h, v), self.step.b
        gates = (-self.normal(b, 1, h).exp(), *([self.normal(b, 1, h).sigmoid()] if room is delta else []))
        self.inputs = (q, F.normalize(keys, dim=-1), values, *gates)
        self.state, self.out = self.normal(b + 3, h, v, k), self.normal(b, 1, h, v, dtype=self.step.dtype)
        self.kernel = partial(kernel.run, *self.inputs, self.state, self.rows, self.out)
        self.torch = self.form("step", op, *self.inputs)
        double = [x.double() for x in self.inputs]
        self.truth = lambda state: room.reference.run(*double, state=state, packing=None)
        A_log, dt_bias, D = self.normal(h), self.normal(h), self.normal(h)
        if room is delta:
            self.whole = partial(self.kernel, 1.0, A_log, dt_bias, 1e-6)
        else:
            self.whole = partial(self.kernel, 1.0, A_log, dt_bias, D)

        def whole_truth(state: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v, a, *b = double
            dt = F.softplus(a + dt_bias.double())
            g = -A_log.double().exp() * dt
            if room is delta:
                return room.reference.run(l2norm(q), l2norm(k), v, g, b[0].sigmoid(), state=state, packing=None)
            y, state = room.reference.run(q, k, v * dt[..., None], g, state=state, packing=None)
            return y + v * D[:, None].double(), state

        self.whole_truth = whole_truth

    def conv(self, channels: int, width: int) -> None:
        b, dtype = self.step.b, self.step.dtype
        x, weight, bias = self.cut(1, channels)[0][:, :, 0], self.normal(channels, width), self.normal(channels)
        self.state, self.out = self.normal(b + 3, width - 1, channels, dtype=dtype), torch.empty_like(x)
        self.inputs = x, weight, bias
        self.kernel = partial(conv_step.run, x, weight, bias, self.state, self.rows, self.out)
        self.torch = self.form("step", conv.causal_conv, x, weight, bias)

        def truth(tail: Tensor) -> tuple[Tensor, Tensor]:
            past = torch.cat([tail, x.double()], 1)
            return conv.reference.run(past, weight.double(), bias.double(), width - 1, None), past[:, 1:]

        self.truth = truth

    def cell(self, heads: int, units: int) -> None:
        cell, b = CELLS[self.step.op], self.step.b
        g, s = len(cell.inputs), len(cell.states)
        x = torch.stack(self.cut(heads, *[units] * g), 2)
        weights = tuple(self.normal(heads, units) for _ in cell.weights)
        bound = cell.bind(self.normal(g, heads, units), weights=weights)
        double = cell.bind(bound.recurrent.double(), weights=tuple(w.double() for w in weights))
        self.state, self.out = self.normal(b + 3, s, heads, units), torch.empty_like(x[:, :, 0])
        self.inputs = (x,)
        self.kernel = partial(cell_step.run, bound, x, self.state, self.rows, self.out, torch.empty(3, device=DEVICE))
        self.torch = self.form("step", shooting.shooting, bound, x)

        def truth(state: Tensor) -> tuple[Tensor, Tensor]:
            states, final = shooting.reference.run(double, x.double(), state, None)
            return states[:, :, 0], final

        self.truth = truth

    def bytes(self) -> int:
        """States twice, inputs, outputs."""
        states = 2 * self.state.nbytes // len(self.state) * self.step.b
        return states + sum(x.nbytes for x in self.inputs) + self.out.nbytes


CELLS: dict[str, shooting.Cell] = {"gru": shooting.GRU(), "lstm": shooting.LSTM(True, True), "slstm": shooting.SLSTM()}

STEPS = {
    "delta": ((16, 8, 64, 128), (16, 16, 128, 128)),  # the last is Qwen3-Next's
    "ssd": ((32, 1, 128, 64),),
    "conv": ((4096, 4),),
    "gru": ((1, 2048),),
    "lstm": ((1, 2048),),
    "slstm": ((4, 512),),
}
ODD_STEPS = {
    "delta": ((6, 2, 96, 80), (3, 3, 7, 33), (4, 1, 256, 256)),
    "ssd": ((6, 2, 96, 80), (3, 3, 7, 33), (4, 1, 256, 256)),
    "conv": ((77, 2), (1025, 8), (2048, 4)),
    "gru": ((3, 77),),
    "lstm": ((3, 77),),
    "slstm": ((3, 77),),
}


def check_step(step: Step) -> float:
    """Some tokens on; two runs give the same bits, and nothing else is written."""
    token, worst = Token(step), 0.0
    others = torch.ones(len(token.state), dtype=torch.bool, device=DEVICE).index_fill(0, token.rows, False)
    untouched = token.state[others].clone()
    ways = [(token.kernel, token.truth)] * 3
    if step.op in ("delta", "ssd"):
        ways.append((token.whole, token.whole_truth))
    for kernel, truth in ways:
        y, new = truth(token.state[token.rows].double())
        before = token.state.clone()
        token.out.fill_(float("nan"))
        kernel()
        limits = LIMITS[step.dtype], LIMITS[token.state.dtype]
        errors = apart(token.out, y), apart(token.state[token.rows], new)
        require(
            all(e <= limit for e, limit in zip(errors, limits, strict=True)), f"{errors} from float64: {step.op} {step}"
        )
        worst = max(worst, *(e / limit for e, limit in zip(errors, limits, strict=True)))
    out, after = token.out.clone(), token.state.clone()
    token.state.copy_(before)
    kernel()
    require(torch.equal(out, token.out) and torch.equal(after, token.state), f"two runs differ: {step.op} {step}")
    require(torch.equal(untouched, token.state[others]), f"others' states changed: {step.op} {step}")
    return worst


def check_steps(op: str) -> float:
    shapes = ((b, sizes) for sizes in ODD_STEPS[op] + STEPS[op] for b in (1, 5))
    return max(check_step(Step(op, b, sizes, dtype)) for b, sizes in shapes for dtype in (BF16, FP32))


def tokens(step: Step, way: str) -> Sets:
    return lambda n: [getattr(Token(step, seed), way) for seed in range(n)]


def step_cases(op: str) -> Iterator[Case]:
    for step in (Step(op, b, sizes) for sizes in STEPS[op] for b in (1, 32)):
        rivals = {"torch": tokens(step, "torch")} if op not in CELLS else {}  # a cell's copies a number from the host
        if op in ("delta", "ssd"):
            rivals["with gates"] = tokens(step, "whole")
        yield Case(op, str(step), Token(step).bytes(), tokens(step, "kernel"), {}, rivals)
