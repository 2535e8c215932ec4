"""Attention over pages, and writing into them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.attention.paged import gathered, reference, write
from plait.ops.attention.paged import triton as paged
from plait.ops.attention.paged.plan import forced_plan
from step_kernels.measuring import BF16, DEVICE, FP16, FP32, LIMITS, Case, Sets, apart, poisoned, require


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
