"""Attention over pages: every form = the loop over rows = attention to the same keys in one piece.

The Triton form runs in Triton's interpreter, which has to be chosen before triton is first imported: in a process of its own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plait.ops.attention import attention
from plait.ops.attention.paged import (
    KERNELS,
    WRITERS,
    gathered,
    paged_attention,
    reference,
    sizes_of,
    sliced,
    write,
    write_pages,
)
from plait.ops.kernels import Call, explain, forced
from plait.ops.rms_norm import rms_norm
from plait.ops.rotary import rotate
from tests.ops.conftest import kind

FORMS = {"gathered": gathered.run, "sliced": sliced.run}


@dataclass
class Pool:
    """Rows of `lengths` tokens, t of them new, on pages in a random order; what nobody should read is `rest`."""

    lengths: tuple[int, ...] = (1, 4, 5, 13, 16)
    t: int = 1
    heads: tuple[int, int] = (4, 2)  # of queries, of keys
    sizes: tuple[int, int] = (6, 5)  # of a key, of a value
    page: int = 4
    table: bool = True
    sinks: bool = False
    dtype: torch.dtype = torch.float64
    stored: torch.dtype | None = None
    rest: float = 9.0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(sum(self.lengths))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        lengths = [max(n, self.t) for n in self.lengths]
        b, (h, g) = len(lengths), self.heads
        count = -(-max(lengths) // self.page) + 1
        if not self.table:
            self.page, count = count * self.page, 1
        self.q = normal(b, self.t, h, self.sizes[0])
        rows = [normal(b, max(lengths), g, size).to(self.stored or self.dtype) for size in self.sizes]
        pages = torch.randperm(b * count, generator=generator) if self.table else torch.arange(b)
        self.pages = pages.view(b, count).int()
        self.k, self.v = (x.new_full((b * count + 1, self.page, *x.shape[2:]), self.rest) for x in rows)
        for pool, x in zip((self.k, self.v), rows, strict=True):
            for row, length in enumerate(lengths):
                places = torch.arange(length)
                pool[self.pages[row, places // self.page].long(), places % self.page] = x[row, :length]
        self.rows, self.sink = rows, normal(h) if self.sinks else None
        self.call = (self.pages if self.table else None, torch.tensor(self.lengths))

    def run(self, form: Any, window: int | None = None, softcap: float | None = None, scale: float = 0.4) -> Tensor:
        return form(self.q, self.k, self.v, *self.call, scale, window, softcap, self.sink)

    def truth(self, **options: Any) -> Tensor:
        double = [None if x is None else x.double() for x in (self.q, self.k, self.v, self.sink)]
        kept = self.q, self.k, self.v, self.sink
        self.q, self.k, self.v, self.sink = double
        try:
            return self.run(reference.run, **options)
        finally:
            self.q, self.k, self.v, self.sink = kept


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("table", [True, False])
def test_the_loop_is_attention_to_keys_in_one_piece(table, t, window, close):
    pool = Pool(t=t, table=table)
    got = paged_reference(pool, window=window)
    for row, length in enumerate(pool.lengths):
        k, v = (x[row : row + 1, : max(length, t)] for x in pool.rows)
        close(got[row : row + 1], attention(pool.q[row : row + 1], k, v, q_start=k.shape[1] - t, window=window))


def paged_reference(pool: Pool, **options: Any) -> Tensor:
    with forced("reference"):
        return paged_attention(pool.q, pool.k, pool.v, *pool.call, **options)


def test_a_sink_is_a_key_without_a_value(close):
    """A logit of its own: a query of zeros beside a key of zeros gives each the weight of exp(0)."""
    pool = Pool((1, 1), sinks=True)
    pool.q.zero_()
    pool.sink[:] = torch.tensor([0.0, 0.0, 1.0, -torch.inf])
    got = pool.run(reference.run)[:, 0] / pool.v[pool.pages[:, 0].long(), 0].repeat_interleave(2, 1)
    close(got[..., 0], torch.tensor([[0.5, 0.5, 1 / (1 + torch.e), 1.0]] * 2, dtype=torch.float64))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("options", [{}, {"window": 1}, {"window": 6}, {"window": 99}, {"softcap": 0.7, "window": 5}])
@pytest.mark.parametrize("pool", [{}, {"t": 3}, {"table": False}, {"table": False, "t": 3, "sinks": True}])
def test_forms(name, pool, options, close):
    for lengths in ((1, 4, 5, 13, 16), (9, 9)):
        close(Pool(lengths, **pool).run(FORMS[name], **options), Pool(lengths, **pool).truth(**options))


def test_a_row_that_is_not_alive_counts_as_having_the_new_tokens(close):
    for form in (reference.run, *FORMS.values()):
        pool = Pool((0, 7), t=2)
        got, pool.call = pool.run(form), (pool.call[0], torch.tensor([2, 7]))
        close(got, pool.run(reference.run))


def test_gathered_is_one_graph_for_all_lengths(close):
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(
        gathered.run, fullgraph=True, dynamic=False, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for lengths in ((1, 4, 5, 13, 16), (2, 16, 3, 8, 16)):
        close(Pool(lengths).run(compiled, window=5), Pool(lengths).truth(window=5))
    assert len(graphs) == 1


@pytest.mark.parametrize("table", [True, False])
def test_what_is_written_is_found(table):
    """Into an empty pool, t tokens at a time; a row that is not alive writes to a page that nobody reads."""
    whole = Pool((12, 12), t=12, table=table)
    pool = Pool((12, 12), table=table)
    k, v = torch.full_like(pool.k, 9.0), torch.full_like(pool.v, 9.0)
    for start in range(0, 12, 3):
        new = [x[:, start : start + 3] for x in whole.rows]
        write_pages(k, v, *new, whole.call[0], torch.tensor([start + 3] * 2))
    assert torch.equal(k, whole.k) and torch.equal(v, whole.v)
    if table:
        scratch = torch.full_like(pool.pages, len(k) - 1)
        write_pages(k, v, *new, scratch, torch.tensor([0, 10**6]))
        assert torch.equal(k[:-1], whole.k[:-1]) and torch.equal(v[:-1], whole.v[:-1])


def test_why_not_triton():
    pool = Pool()
    assert dict(explain(KERNELS, call(pool)))["triton"] == "needs an NVIDIA GPU"
    for change, reason in (
        ({"dtype": torch.float64}, "float64"),
        ({"sizes": (512, 5)}, "512"),
        ({"t": 17}, "16 new tokens"),
    ):
        pool = Pool(**{"dtype": torch.float32} | change)
        assert reason in dict(explain(KERNELS, call(pool)._replace(device="cuda")))["triton"]
    assert dict(explain(KERNELS, call(Pool(dtype=torch.float32))._replace(device="cuda")))["triton"] == "used"
    assert dict(explain(WRITERS, call(pool)))["sliced"] == "used"


def call(pool: Pool):
    return Call("cpu", pool.dtype, kind(pool.t), pooled=True, sizes=sizes_of(pool.q, pool.k, pool.v))


def test_kernels_in_the_interpreter(run_checks_in_the_interpreter):
    run_checks_in_the_interpreter(__file__)


# float32 over at most 40 keys; in float16, weights and outputs are rounded to 11 bits
WITHIN = {torch.float32: 2e-6, torch.float16: 1e-3}


def triton_agrees(pool: Pool, plan: dict[str, int], **options: Any) -> Tensor:
    from plait.ops.attention.paged import triton
    from plait.ops.attention.paged.plan import forced_plan

    with forced_plan(BN=16, **plan):
        got = pool.run(triton.run, **options)
    want = pool.truth(**options)
    assert got.dtype == pool.dtype and got.isfinite().all()
    assert (got.double() - want).abs().max() <= WITHIN[pool.dtype] * want.abs().max()
    return got


LONG = (1, 40)  # one tile of 16, and three
NAN = {"rest": float("nan"), "dtype": torch.float32}
WINDOWED = {"window": 18, "softcap": 0.7}


@pytest.mark.parametrize(
    ("splits", "pool", "options"),
    [
        (1, {}, {}),
        (2, {}, {}),  # of two tiles and of one
        (4, {"table": False, "sinks": True}, {}),
        (1, {"table": False, "sinks": True}, WINDOWED),
        (2, {"page": 16, "sizes": (20, 33)}, WINDOWED),
        (2, {"page": 32, "t": 3, "heads": (6, 1), "sinks": True}, WINDOWED),  # more queries than a tile has
    ],
)
def check_every_shape(pool: dict, options: dict, splits: int):
    triton_agrees(Pool(LONG, **NAN | pool), {"splits": splits, "BM": 16}, **options)


def check_narrow():
    """But for products in bfloat16, which the interpreter takes for whole numbers."""
    for dtypes in ({"dtype": torch.float16}, NAN | {"stored": torch.bfloat16}):
        triton_agrees(Pool((20,), heads=(2, 1), **dtypes), {})


def check_a_row_is_alone():
    """The same bits whoever else is there, how long they are, and where the pages lie."""
    pool = Pool(LONG, heads=(2, 1), **NAN)
    whole = triton_agrees(pool, {})
    pool.q, pool.call = pool.q[1:], (pool.pages[1:], torch.tensor(LONG[1:]))
    assert torch.equal(triton_agrees(pool, {}), whole[1:])


@pytest.mark.parametrize("pool", [{"t": 3}, {"t": 2, "table": False, "sizes": (300, 7)}])
def check_writing(pool: dict):
    from plait.ops.attention.paged import triton

    for lengths in (LONG, (0, 10**6)):
        p = Pool(LONG, dtype=torch.float16, **pool)  # the interpreter rounds to bfloat16 in its own way
        wide = torch.randn(2, p.t, 2, sum(p.sizes) + 1)
        new = wide.split_with_sizes((p.sizes[0], p.sizes[1], 1), 3)[:2]
        results = []
        for run in (write.run, triton.write):
            k, v = p.k.clone(), p.v.clone()
            run(k, v, *new, p.call[0], torch.tensor(lengths))
            results.append((k, v))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("pool", [{"t": 2}, {"table": False}])
@pytest.mark.parametrize(("zero_centered", "rotated"), [(False, 12), (True, 12), (True, 8), (None, 8)])
@torch.no_grad()
def check_new_tokens_in_place(pool: dict, zero_centered: bool | None, rotated: int):
    """Normed (None: not) and turned one after the other in float64, and written; in float16, which is rounded to 11 bits."""
    from plait.ops.attention.paged import placed

    p = Pool(LONG, sizes=(12, 7), heads=(6, 2), dtype=torch.float16, **pool)
    b, t = p.q.shape[:2]
    projected = torch.randn(b, t, 9 * 12, generator=torch.Generator().manual_seed(0)).half()
    qk, v = projected[..., :96].unflatten(2, (8, 12)), projected[..., 94:].unflatten(2, (2, 7))
    cos, sin = torch.randn(2, b, t, 1, 1, rotated // 2).half()
    sin = torch.cat([-sin, sin], 3)
    weights = torch.randn(2, 12)
    want_qk = qk.double()
    if zero_centered is not None:
        parts = zip(want_qk.split_with_sizes((6, 2), 2), weights.double(), strict=True)
        want_qk = torch.cat([rms_norm(x, weight, 1e-3, zero_centered) for x, weight in parts], 2)
    want_qk = rotate(want_qk, cos.double(), sin.double())
    want_k, want_v, k_pages, v_pages = p.k.double(), p.v.double(), p.k.clone(), p.v.clone()
    write.run(want_k, want_v, want_qk[:, :, 6:], v.double(), *p.call)
    norms = {} if zero_centered is None else {"norms": tuple(weights), "eps": 1e-3, "zero_centered": zero_centered}
    got = placed.place(qk, v, cos, sin, k_pages, v_pages, *p.call, **norms)
    for one, other in ((got, want_qk[:, :, :6]), (k_pages, want_k)):
        assert one.shape == other.shape
        assert (one.double() - other).abs().max() <= WITHIN[torch.float16] * other.abs().max()
    assert torch.equal(v_pages.double(), want_v)


@torch.no_grad()
def check_a_page_of_more_numbers_than_32_bits_count():
    """As the one page of a row is after a million tokens of 16 heads of 128; of memory that is there but for the most part."""
    from plait.ops.attention.paged import placed, triton

    far = 2**30
    memory = torch.from_numpy(np.empty(2 * far + 16, dtype=np.float16))  # torch.empty would be filled, and so be there
    k_pages, v_pages = memory.as_strided((1, 3, 1, 16), (0, far, 16, 1)), torch.zeros(1, 3, 1, 16).half()
    new, lengths = torch.arange(1.0, 17).half().view(1, 1, 1, 16), torch.tensor([3])
    triton.write(k_pages, v_pages, new, new, None, lengths)
    assert torch.equal(k_pages[0, 2], new[0, 0])
    turns = torch.ones(1, 1, 1, 1, 8).half(), torch.zeros(1, 1, 1, 2, 8).half()
    placed.place(torch.cat([new, 2 * new], 2), new, *turns, k_pages, v_pages, None, lengths)
    assert torch.equal(k_pages[0, 2], 2 * new[0, 0])


def check_a_compiled_graph_holds_the_kernels():
    from plait.ops.attention.paged import _attention, _write

    pool = Pool((20,), **NAN)

    def step(q, k, v, table, lengths):
        _write(k, v, q[:, :, :2], q[:, :, :2, :5], table, lengths)
        return _attention(q, k, v, table, lengths, 0.4, None, None, None)

    graphs = []
    compiled = torch.compile(step, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    got = compiled(pool.q, pool.k, pool.v, *pool.call)
    assert torch.equal(got, step(pool.q, pool.k, pool.v, *pool.call)) and len(graphs) == 1
