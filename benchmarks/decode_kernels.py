"""Kernels of a decoding step on a GPU: each is checked against float64 before it is timed inside a CUDA graph.

    python benchmarks/decode_kernels.py [--only paged,write] [--shapes 0,2] [--sweep] [--out FILE.json]

A time is the median over replays of a graph that holds the call once for each of several sets of tensors, as the layers of a
model are, so that together they do not fit the cache; by the number of calls. `floor` is what must be read and written at the
card's own copy speed, measured first. Errors are |got - want| / |want| over whole tensors, the largest over all checks.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from plait.ops import conv, delta, shooting
from plait.ops import ssd as ssd_room
from plait.ops.attention.paged import gathered, reference, write
from plait.ops.attention.paged import triton as paged
from plait.ops.attention.paged.plan import forced_plan
from plait.ops.conv import triton as conv_step
from plait.ops.delta import gated_delta
from plait.ops.delta import triton as delta_step
from plait.ops.kernels import forced
from plait.ops.rms_norm import gated_rms_norm, l2norm, rms_norm
from plait.ops.rotary import rotate
from plait.ops.shooting.triton import step as cell_step
from plait.ops.ssd import ssd
from plait.ops.ssd import triton as ssd_step
from plait.ops.swiglu import swiglu

SETS_BYTES, MOST_SETS = 200e6, 24  # four times the cache of an H100; the layers of a model
# rounding of what comes out, and in attention of the weights, to 8 or 11 bits; float32 sums over some thousands of terms
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}
DEVICE, BF16, FP16, FP32 = "cuda", torch.bfloat16, torch.float16, torch.float32

Run = Callable[[], Any]
Sets = Callable[[int], list[Run]]  # so many calls, each on tensors of its own


@dataclass
class Case:
    """One kernel at one shape, other plans for it, and other ways to the same."""

    kernel: str
    shape: str
    bytes: int
    sets: Sets
    variants: dict[str, dict[str, int]] = field(default_factory=dict)
    rivals: dict[str, Sets] = field(default_factory=dict)


# --- measuring


def captured(runs: list[Run]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph


def microseconds(runs: list[Run], repeat: int = 40) -> float:
    """Of one call, in the middle of `repeat` replays."""
    graph = captured(runs)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    del graph
    return 1e3 * statistics.median(times) / len(runs)


def copy_speed() -> float:
    """Bytes read and written per second by a large copy."""
    a = torch.randn(2**28, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.nbytes / (1e-6 * microseconds([lambda: b.copy_(a)]))


def apart(got: Tensor, want: Tensor) -> float:
    """Not a number is infinitely far."""
    distance = float((got.double() - want.double()).norm() / want.double().norm())
    return distance if distance == distance else float("inf")


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote is not a number."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def require(true: bool, what: str) -> None:
    if not true:
        raise SystemExit(f"WRONG: {what}")


# --- attention over pages


@dataclass(frozen=True)
class Shape:
    """Rows of up to `longest` tokens, t of them new. page 0: a page per row and no table. spare: capacity over `longest`."""

    b: int
    longest: int
    h: int = 16
    g: int = 4
    key: int = 64
    value: int = 64
    t: int = 1
    page: int = 256
    spare: float = 1.0
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = BF16
    stored: torch.dtype | None = None
    ragged: bool = False

    def __str__(self) -> str:
        pages = f"pages of {self.page}" if self.page else "no table"
        sizes = f"{self.key}" if self.key == self.value else f"{self.key}/{self.value}"
        kind = str(self.dtype).removeprefix("torch.")
        more = f", window {self.window}" if self.window else ""
        more += f", {self.t} new" if self.t > 1 else ""
        more += f", room for {self.spare:.0f}x" if self.spare > 1 else ""
        return f"b {self.b} keys {self.longest} heads {self.h}/{self.g} of {sizes}, {pages}, {kind}{more}"


class Paged:
    """A call of this shape: pages in a random order, random numbers everywhere."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape = s = shape
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = s.dtype) -> Tensor:
            return torch.randn(*shape, device=DEVICE, generator=generator, dtype=dtype)

        capacity = int(s.longest * s.spare)
        count, page = (-(-capacity // s.page), s.page) if s.page else (1, capacity)
        self.lengths, self.table = torch.full((s.b,), s.longest, device=DEVICE), None
        if s.ragged:
            low = max(s.t, s.longest // 2)
            self.lengths[1:] = torch.randint(low, s.longest + 1, (s.b - 1,), device=DEVICE, generator=generator)
        if s.page:
            pages = torch.randperm(s.b * count, device=DEVICE, generator=generator)
            self.table = pages.view(s.b, count).int()
        self.q = normal(s.b, s.t, s.h, s.key)
        self.k, self.v = (normal(s.b * count, page, s.g, n, dtype=s.stored or s.dtype) for n in (s.key, s.value))
        self.sink = normal(s.h) if s.sinks else None
        self.options = (s.key**-0.5, s.window, s.softcap, self.sink)

    def bytes(self) -> int:
        """Keys and values that are seen, queries and outputs."""
        s = self.shape
        seen = self.lengths if s.window is None else self.lengths.clamp(max=s.window + s.t - 1)
        pair = s.g * (s.key + s.value) * self.k.element_size()
        return int(seen.sum()) * pair + self.q.nbytes + self.q.nbytes * s.value // s.key

    def run(self, form: Callable[..., Tensor]) -> Tensor:
        return form(self.q, self.k, self.v, self.table, self.lengths, *self.options)

    def row(self, i: int) -> Tensor:
        """What row i alone gives; without a table its page must come first."""
        table = None if self.table is None else self.table[i : i + 1]
        k, v = (x if table is not None else x[i : i + 1] for x in (self.k, self.v))
        return paged.run(self.q[i : i + 1], k, v, table, self.lengths[i : i + 1], *self.options)

    def truth(self, rows: list[int]) -> Tensor:
        """Of some rows, in float64."""
        out = []
        for i in rows:
            pages = torch.tensor([i], device=DEVICE) if self.table is None else self.table[i]
            k, v = (x[pages.long()].double() for x in (self.k, self.v))
            table = torch.arange(len(pages), device=DEVICE)[None]
            sink = None if self.sink is None else self.sink.double()
            options = (*self.options[:3], sink)
            out.append(reference.run(self.q[i : i + 1].double(), k, v, table, self.lengths[i : i + 1], *options))
        return torch.cat(out)

    def spoil(self) -> None:
        """Everything past the ends, and with a window what has left it, is not a number."""
        s, page = self.shape, self.k.shape[1]
        places = torch.arange(page * (1 if self.table is None else self.table.shape[1]), device=DEVICE)
        unseen = places >= self.lengths[:, None]
        if s.window is not None:
            unseen |= places <= (self.lengths - s.t - s.window)[:, None]
        pages = torch.arange(s.b, device=DEVICE)[:, None] if self.table is None else self.table.long()
        pages = pages.repeat_interleave(page, 1)
        for x in (self.k, self.v):
            x[pages[unseen], (places % page).expand_as(unseen)[unseen]] = float("nan")


def check_paged(shape: Shape, seed: int = 0) -> float:
    """The distance to float64; the program ends where a law is broken."""
    problem, few = Paged(shape, seed), sorted({0, shape.b // 2, shape.b - 1})
    want = problem.truth(few)
    with poisoned():
        clean = problem.run(paged.run)
        problem.spoil()
        got = problem.run(paged.run)
        again = problem.run(paged.run)
        alone = [problem.row(i)[0] for i in few]
    require(torch.equal(got, again), f"two runs differ: {shape}")
    require(torch.equal(got, clean), f"what nobody may read was read: {shape}")
    require(all(torch.equal(got[i], one) for i, one in zip(few, alone, strict=True)), f"a row hears others: {shape}")
    error = apart(got[few], want)
    require(error <= LIMITS[shape.dtype], f"{error:.1e} from float64: {shape}")
    return error / LIMITS[shape.dtype]


def check_graph(shape: Shape) -> None:
    """One captured graph serves other lengths and another table."""
    problem = Paged(shape)
    out = problem.run(paged.run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = problem.run(paged.run)
    problem.lengths.copy_(torch.randint(shape.t, shape.longest, (shape.b,), device=DEVICE))
    if problem.table is not None:
        problem.table.copy_(problem.table.flip(0))
    graph.replay()
    require(torch.equal(held, problem.run(paged.run)), "a captured graph kept lengths or table")
    require(not torch.equal(held, out), "lengths change nothing")


CHECKED = (
    Shape(3, 301, ragged=True),
    Shape(5, 77, page=16, ragged=True),
    Shape(2, 3000, h=8, g=8, key=128, value=128, page=64, spare=3.1),
    Shape(3, 1001, h=12, g=2, key=96, value=80, page=48, ragged=True),
    Shape(3, 517, h=32, g=2, key=32, value=32, page=0, t=5, ragged=True),
    Shape(2, 700, h=24, g=1, key=256, value=256, page=128, t=16),
    Shape(4, 2000, window=300, page=64, t=3, sinks=True, softcap=20.0, ragged=True),
    Shape(4, 2000, window=1, page=16),
    Shape(3, 900, page=0, sinks=True, ragged=True),
    Shape(2, 500, page=0, window=129, dtype=FP16),
    Shape(3, 301, dtype=FP32, page=32, ragged=True),
    Shape(2, 301, h=4, g=4, key=256, value=128, dtype=FP32),
    Shape(2, 301, dtype=FP32, stored=BF16),
    Shape(3, 16),
    Shape(2, 1, page=16),
)

TIMED = (
    *(Shape(b, n) for b in (1, 32) for n in (64, 1024, 16384)),
    *(Shape(1, 16384, page=page) for page in (16, 64, 0)),
    Shape(1, 1024, spare=16),
    Shape(8, 16384, ragged=True),
    Shape(1, 16384, h=32, g=8, key=128, value=128),
    Shape(32, 4096, h=32, g=8, key=128, value=128),
    Shape(1, 16384, g=16),
    Shape(1, 16384, g=1, key=256, value=256),
    Shape(1, 131072),
    *(Shape(b, 16384, window=1024) for b in (1, 32)),
    Shape(1, 16384, t=8),
    Shape(1, 16384, dtype=FP32),
)

SWEEP = {
    f"BN {BN} stages {stages} warps {warps} splits {splits or 'auto'}": {"BN": BN, "STAGES": stages, "num_warps": warps}
    | ({"splits": splits} if splits else {})
    for BN, stages, warps, splits in (
        *((BN, stages, 4, 0) for BN in (32, 64, 128) for stages in (3, 5)),
        *((64, 5, warps, 0) for warps in (2, 8)),
        *((64, 5, 4, splits) for splits in (32, 132)),
    )
}


def check_all_paged() -> float:
    worst = max(check_paged(shape) for shape in CHECKED)
    for splits in (1, 3, 200):
        with forced_plan(splits=splits):
            worst = max(worst, check_paged(Shape(3, 777, page=64, sinks=True, ragged=True), seed=splits))
    check_graph(Shape(4, 900, page=64))
    check_graph(Shape(4, 900, page=0, window=100))
    return worst


def attend(form: Callable[..., Tensor], shape: Shape) -> Sets:
    return lambda n: [partial(Paged(shape, seed=i).run, form) for i in range(n)]


def sdpa(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """torch's own, on keys in one piece and of the right length."""
    o = F.scaled_dot_product_attention(q.unflatten(2, (k.shape[2], -1))[:, 0], k.transpose(1, 2), v.transpose(1, 2))
    return o.flatten(1, 2)[:, None]


def paged_cases() -> Iterator[Case]:
    for shape in TIMED:
        rivals = {"gathered": attend(gathered.run, shape)}
        if shape.window is None and shape.t == 1 and not shape.ragged:
            rivals["torch sdpa in one piece"] = attend(sdpa, replace(shape, page=0, spare=1.0))
        yield Case("paged", str(shape), Paged(shape).bytes(), attend(paged.run, shape), SWEEP, rivals)


# --- writing into pages


def new_pages(shape: Shape, seed: int = 0) -> tuple[Tensor, ...]:
    """New keys and values, as a projection of all heads leaves them: strided."""
    p, both = Paged(shape, seed), shape.key + shape.value
    new = torch.randn(shape.b, shape.t, shape.g, both, device=DEVICE, dtype=shape.dtype)
    return p.k, p.v, *new.split_with_sizes((shape.key, shape.value), 3), p.table, p.lengths


def check_all_writes() -> float:
    for shape in (
        Shape(5, 300, page=16, t=3, ragged=True),
        Shape(3, 99, page=0, key=96, value=33, g=3, ragged=True),
        Shape(2, 50, dtype=FP32, stored=BF16),
    ):
        k, v, *rest = new_pages(shape)
        want_k, want_v = k.clone(), v.clone()
        write.run(want_k, want_v, *rest)
        paged.write(k, v, *rest)
        require(torch.equal(k, want_k) and torch.equal(v, want_v), f"what was written: {shape}")
    return 0.0


def put(form: Callable[..., None], shape: Shape) -> Sets:
    return lambda n: [partial(form, *new_pages(shape, i)) for i in range(n)]


def write_cases() -> Iterator[Case]:
    for shape in (Shape(1, 1024), Shape(32, 1024), Shape(32, 1024, g=8, key=128, value=128)):
        moved = 2 * shape.b * shape.t * shape.g * (shape.key + shape.value) * 2
        yield Case("write", str(shape), moved, put(paged.write, shape), {}, {"gathered": put(write.run, shape)})


# --- a token on the rows of a pool


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


# --- norms


@dataclass(frozen=True)
class Rows:
    """Rows of `groups` times d channels, with or without a gate."""

    b: int
    groups: int
    d: int
    gated: bool
    dtype: torch.dtype = BF16

    def __str__(self) -> str:
        gate = ", gated" if self.gated else ""
        return f"b {self.b} of {self.groups} x {self.d}{gate}, {str(self.dtype).removeprefix('torch.')}"


def norm_inputs(rows: Rows, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    both = torch.randn(2, rows.b, 1, rows.groups, rows.d, device=DEVICE, generator=generator).to(rows.dtype)
    weight = torch.randn(rows.d, device=DEVICE, generator=generator)
    return both[0], weight, 1e-6, *([both[1]] if rows.gated else [])


def norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    return rms_norm(x, weight, eps) if gate is None else gated_rms_norm(x, gate, weight, eps)


def by_torch(*inputs: Any) -> Tensor:
    with torch.enable_grad():  # what training runs
        return norm(*inputs)


def check_norms() -> float:
    worst = 0.0
    for shape in ((3, 5, 77), (1, 16, 128), (2, 1, 1024), (5, 1, 8192)):
        for gated in (False, True):
            for dtype in (BF16, FP32):
                inputs = norm_inputs(Rows(*shape, gated, dtype))
                want = norm(*(x.double() if isinstance(x, Tensor) else x for x in inputs))
                worst = max(worst, apart(norm(*inputs), want) / LIMITS[dtype])
    require(worst <= 1, f"norms are {worst:.1f} times further from float64 than they may")
    return worst


def norms(form: Callable[..., Tensor], rows: Rows) -> Sets:
    return lambda n: [partial(form, *norm_inputs(rows, seed)) for seed in range(n)]


def norm_cases() -> Iterator[Case]:
    for sizes in ((1, 1024, False), (16, 128, True), (1, 2048, True)):
        for rows in (Rows(b, *sizes) for b in (1, 32)):
            moved = (2 + rows.gated) * rows.b * rows.groups * rows.d * 2
            yield Case("norm", str(rows), moved, norms(norm, rows), {}, {"torch": norms(by_torch, rows)})


# --- number by number


def heads(b: int, seed: int = 0, dtype: torch.dtype = BF16) -> tuple[Tensor, ...]:
    """Queries and keys of 20 heads of 64, cut out of a projection, with angles."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(b, 1, 24, 64, device=DEVICE, generator=generator)[:, :, :20]
    angles = torch.randn(b, 1, 1, 1, 32, device=DEVICE, generator=generator)
    return x.to(dtype), angles.cos().to(dtype), torch.cat([-angles.sin(), angles.sin()], -2).to(dtype)


def hidden(b: int, seed: int = 0, dtype: torch.dtype = BF16) -> tuple[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(b, 1, 2 * 2816, device=DEVICE, generator=generator).to(dtype),)


SMALL = {"rotate": (rotate, heads), "swiglu": (swiglu, hidden)}


def check_small() -> float:
    worst = 0.0
    for op, make in SMALL.values():
        for b in (1, 5):
            for dtype in (BF16, FP32):
                inputs = make(b, 0, dtype)
                worst = max(worst, apart(op(*inputs), op(*(x.double() for x in inputs))) / LIMITS[dtype])
    require(worst <= 1, f"{worst:.1f} times further from float64 than allowed")
    return worst


def small_cases() -> Iterator[Case]:
    for name, (op, make) in SMALL.items():
        for b in (1, 32):

            def sets(n: int, form: Callable[..., Tensor] = op, b: int = b, make: Any = make) -> list[Run]:
                return [partial(form, *make(b, seed)) for seed in range(n)]

            def plain(n: int, op: Callable[..., Tensor] = op, sets: Any = sets) -> list[Run]:
                return sets(n, torch.enable_grad()(op))

            yield Case(name, f"b {b}", 2 * make(b)[0].nbytes, sets, {}, {"torch": plain})


# --- all of it


KERNELS = {"paged": (check_all_paged, paged_cases), "write": (check_all_writes, write_cases)}
KERNELS |= {"norm": (check_norms, norm_cases), "small": (check_small, small_cases)}
KERNELS |= {op: (partial(check_steps, op), partial(step_cases, op)) for op in STEPS}


def measured(case: Case, speed: float, sweep: bool) -> dict[str, Any]:
    n = max(1, min(MOST_SETS, int(SETS_BYTES / case.bytes) + 1))
    start = perf_counter()
    case.sets(1)[0]()
    torch.cuda.synchronize()
    first = perf_counter() - start
    row: dict[str, Any] = {"kernel": case.kernel, "shape": case.shape, "calls": n, "first_s": first}
    row["us"] = microseconds(case.sets(n))
    row["floor_us"] = 1e6 * case.bytes / speed
    row["GB/s"] = 1e-3 * case.bytes / row["us"]
    row["rivals"] = {name: microseconds(sets(n)) for name, sets in case.rivals.items()}
    if sweep and case.variants:
        runs, row["variants"] = case.sets(n), {}
        for name, sizes in case.variants.items():
            with forced_plan(**sizes):
                try:
                    row["variants"][name] = microseconds(runs)
                except (
                    RuntimeError,
                    triton.runtime.errors.OutOfResources,
                ) as error:  # more shared memory than there is
                    row["variants"][name] = str(error).splitlines()[0][:80]
    return row


def line(row: dict[str, Any]) -> str:
    rivals = "  ".join(f"{name} {us:.1f}" for name, us in row["rivals"].items())
    text = f"{row['kernel']:6} {row['shape']:70} {row['us']:8.1f} us (floor {row['floor_us']:6.1f}, {row['GB/s']:4.0f} GB/s)"
    text += f"  {rivals}"
    best = sorted((us, name) for name, us in row.get("variants", {}).items() if not isinstance(us, str))[:3]
    return text + "".join(f"\n{'':20}{us:8.1f} us with {name}" for us, name in best)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(KERNELS))
    parser.add_argument("--sweep", action="store_true", help="also time other sizes of the programs")
    parser.add_argument("--shapes", help="numbers of the shapes to time, all if left out")
    parser.add_argument("--check", action="store_true", help="check only")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    speed = copy_speed()
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_GB/s": speed / 1e9,
    }
    print(about, flush=True)
    rows = []
    for name in options.only.split(","):
        check, cases = KERNELS[name]
        start = perf_counter()
        print(f"{name}: right, {check():.2f} of what is allowed at most ({perf_counter() - start:.0f} s)", flush=True)
        torch.cuda.empty_cache()
        for number, case in enumerate(() if options.check else cases()):
            if options.shapes and str(number) not in options.shapes.split(","):
                continue
            rows.append(measured(case, speed, options.sweep))
            print(line(rows[-1]), flush=True)
            torch.cuda.empty_cache()
            if options.out:
                options.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
