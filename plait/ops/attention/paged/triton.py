"""Paged attention as Triton kernels: the keys of a row are cut into splits, which run side by side and are joined in order
(flash decoding: https://pytorch.org/blog/flash-decoding; the softmax along the keys is arXiv 2205.14135's).

Lengths and table are read on the device. The grid is that of the longest row that could be; programs that find no keys of
their own leave at once. The heads of a group are rows of one product, so that its keys are read once.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.ops.attention.paged.plan import plan
from plait.ops.launch import kernel, launch
from plait.ops.numbers import power_of_two

LOG2E = tl.constexpr(1.4426950408889634)
JOINED = 64  # splits that are joined at once, and channels of them


@triton.jit
def _span(lengths, row, capacity, splits, T: tl.constexpr, WINDOW: tl.constexpr, BN: tl.constexpr):
    """A row's first query's position, its first tile of keys, how many tiles, and how many of them a split has."""
    start = tl.minimum(tl.maximum(tl.load(lengths + row), T), capacity).to(tl.int32) - T
    first = 0
    if WINDOW > 0:
        first = tl.maximum(start - WINDOW + 1, 0) // BN
    tiles = (start + T + BN - 1) // BN - first
    return start, first, tiles, (tiles + splits - 1) // splits


@kernel
def attend(
    q, k, v, table, lengths, sinks, out, parts, sums, scale, softcap,
    q_b, q_t, q_h, k_p, k_s, k_g, v_p, v_s, v_g, capacity, n, splits,
    T: tl.constexpr, TIMES: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program runs one split of one row's keys for up to BM queries of one group of heads. With one split it writes
    `out` (b, t, h, v), otherwise the weighted values (b h t, splits, v) and the softmax's maximum and sum in `sums`."""
    blocks: tl.constexpr = (TIMES * T + BM - 1) // BM
    program = tl.program_id(0)
    block, g = program % blocks, program // blocks % G
    split, row = program // (blocks * G) % splits, program // (blocks * G) // splits
    start, first, tiles, each = _span(lengths, row, capacity, splits, T, WINDOW, BN)
    if split * each >= tiles:
        return

    query = block * BM + tl.arange(0, BM)
    head, token = g * TIMES + query // T, query % T
    real = query < TIMES * T
    at_q = start + token
    c, d = tl.arange(0, BK), tl.arange(0, BV)
    here = q + row.to(tl.int64) * q_b + token[:, None] * q_t + head[:, None] * q_h + c[None, :]
    queries = tl.load(here, mask=real[:, None] & (c < K)[None, :], other=0.0)

    best = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if parts is None and sinks is not None:
        best = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
        total += 1.0
    acc = tl.zeros((BM, BV), tl.float32)
    low = first + split * each
    tile = low * BN  # its first key
    for _ in tl.range(low, tl.minimum(low + each, first + tiles), num_stages=STAGES):
        at = tile + tl.arange(0, BN)
        inside = at < start + T
        if WINDOW > 0:  # what lies before it may be another row's by now
            inside = inside & (at > start - WINDOW)
        if table is None or PAGE % BN == 0:  # a tile lies on one page
            page, offset, s = row.to(tl.int64), tile, tl.arange(0, BN)
            if table is not None:
                page, offset = tl.load(table + row * n + tile // PAGE).to(tl.int64), tile % PAGE
            at_k = page * k_p + offset.to(tl.int64) * k_s + s[None, :] * k_s
            at_v = page * v_p + offset.to(tl.int64) * v_s + s[:, None] * v_s
        else:
            pages, s = tl.load(table + row * n + at // PAGE, mask=inside, other=0).to(tl.int64), at % PAGE
            at_k, at_v = (pages * k_p + s * k_s)[None, :], (pages * v_p + s * v_s)[:, None]
        keys = tl.load(
            k + g * k_g + at_k + c[:, None], mask=inside[None, :] & (c < K)[:, None], other=0.0
        )  # fmt: skip
        logits = tl.dot(queries, keys.to(queries.dtype), input_precision="ieee") * scale
        if softcap is not None:
            logits = softcap - 2.0 * softcap / (1.0 + tl.exp2(2.0 * logits))  # softcap tanh(logits), both times log2(e)
        seen = at[None, :] <= at_q[:, None]
        if WINDOW > 0:
            seen = seen & (at[None, :] > at_q[:, None] - WINDOW)
        logits = tl.where(seen, logits, float("-inf"))
        top = tl.maximum(best, tl.max(logits, 1))
        level = tl.where(top == float("-inf"), 0.0, top)  # of a query that has seen nothing yet
        weights = tl.exp2(logits - level[:, None])
        keep = tl.exp2(best - level)
        total = total * keep + tl.sum(weights, 1)
        values = tl.load(
            v + g * v_g + at_v + d[None, :], mask=inside[:, None] & (d < V)[None, :], other=0.0
        )  # fmt: skip
        acc = acc * keep[:, None]
        acc = tl.dot(weights.to(queries.dtype), values.to(queries.dtype), acc, input_precision="ieee")
        best = top
        tile += BN

    exists = real[:, None] & (d < V)[None, :]
    if parts is None:
        there = ((row.to(tl.int64) * T + token) * (G * TIMES) + head) * V
        tl.store(out + there[:, None] + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=exists)
    else:
        unit = ((row.to(tl.int64) * G + g) * (TIMES * T) + query) * splits + split
        tl.store(parts + unit[:, None] * V + d[None, :], acc, mask=exists)
        tl.store(sums + unit * 2, best, mask=real)
        tl.store(sums + unit * 2 + 1, total, mask=real)


@kernel
def join(
    lengths, sinks, out, parts, sums, capacity, splits,
    T: tl.constexpr, TIMES: tl.constexpr, G: tl.constexpr, V: tl.constexpr, WINDOW: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """A program joins the splits of BV channels of one query of one head, always in the same order."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    unit = tl.program_id(0) // blocks
    query, g, row = unit % (TIMES * T), unit // (TIMES * T) % G, unit // (TIMES * T * G)
    head, token = g * TIMES + query // T, query % T
    start, first, tiles, each = _span(lengths, row, capacity, splits, T, WINDOW, BN)
    used = (tiles + each - 1) // each
    d, s = tl.program_id(0) % blocks * BV + tl.arange(0, BV), tl.arange(0, BS)
    best, total = tl.full((1,), float("-inf"), tl.float32), tl.zeros((1,), tl.float32)
    if sinks is not None:
        best = tl.zeros((1,), tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
        total += 1.0
    acc = tl.zeros((BV,), tl.float32)
    for split in range(0, used, BS):
        here = unit.to(tl.int64) * splits + split + s
        exists = split + s < used
        tops = tl.load(sums + here * 2, mask=exists, other=float("-inf"))
        part = tl.load(parts + here[:, None] * V + d[None, :], mask=exists[:, None] & (d < V)[None, :], other=0.0)
        top = tl.maximum(best, tl.max(tops, 0))
        level = tl.where(top == float("-inf"), 0.0, top)
        weights, keep = tl.exp2(tops - level), tl.exp2(best - level)
        total = total * keep + tl.sum(weights * tl.load(sums + here * 2 + 1, mask=exists, other=0.0), 0)
        acc = acc * keep + tl.sum(weights[:, None] * part, 0)
        best = top
    there = ((row.to(tl.int64) * T + token) * (G * TIMES) + head) * V
    tl.store(out + there + d, (acc / total).to(out.dtype.element_ty), mask=d < V)


@kernel
def put(
    k_pages, v_pages, k, v, table, lengths,
    kp_p, kp_s, kp_g, vp_p, vp_s, vp_g, k_b, k_t, k_g, v_b, v_t, v_g, capacity, n,
    T: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program writes the keys and values of one token."""
    row, token = tl.program_id(0) // T, tl.program_id(0) % T
    at = tl.minimum(tl.maximum(tl.load(lengths + row) - T, 0).to(tl.int32) + token, capacity - 1)
    page, offset = row.to(tl.int64), at
    if table is not None:
        page, offset = tl.load(table + row * n + at // PAGE).to(tl.int64), at % PAGE
    offset = offset.to(tl.int64)  # the one page of a row may hold more than 2**31 numbers
    for first in tl.static_range(0, G * K, BLOCK):
        i = first + tl.arange(0, BLOCK)
        new = tl.load(k + row.to(tl.int64) * k_b + token * k_t + i // K * k_g + i % K, mask=i < G * K)
        there = k_pages + page * kp_p + offset * kp_s + i // K * kp_g + i % K
        tl.store(there, new.to(k_pages.dtype.element_ty), mask=i < G * K)
    for first in tl.static_range(0, G * V, BLOCK):
        i = first + tl.arange(0, BLOCK)
        new = tl.load(v + row.to(tl.int64) * v_b + token * v_t + i // V * v_g + i % V, mask=i < G * V)
        there = v_pages + page * vp_p + offset * vp_s + i // V * vp_g + i % V
        tl.store(there, new.to(v_pages.dtype.element_ty), mask=i < G * V)


# --- the host's side


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    lengths: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Shapes as in `paged_attention`."""
    (b, t, h, K), (page, G, V) = q.shape, v.shape[1:]
    capacity, n = (page, 0) if table is None else (page * table.shape[1], table.shape[1])
    visible = capacity if window is None else min(capacity, window + t - 1)
    chosen = plan(h // G * t, G, max(K, V), q.element_size(), visible, table is not None, multiprocessors(q.device))
    out, splits = q.new_empty(b, t, h, V), chosen.splits
    parts = sums = None
    if splits > 1:
        parts, sums = (q.new_empty(b * h * t, splits, size, dtype=torch.float32) for size in (V, 2))
    sizes = {"T": t, "TIMES": h // G, "G": G, "V": V, "WINDOW": window or 0, "BN": chosen.BN}
    blocks = -(-(h // G * t) // chosen.BM)
    launch(
        attend, b * splits * G * blocks, q, k, v, table, lengths, sinks, out, parts, sums,
        scale * LOG2E.value / (softcap or 1.0), softcap and softcap * LOG2E.value,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], capacity, n, splits,
        **sizes, K=K, PAGE=page, BM=chosen.BM, BK=max(16, power_of_two(K)), BV=max(16, power_of_two(V)),
        STAGES=chosen.STAGES, num_warps=chosen.num_warps,
    )  # fmt: skip
    if splits > 1:
        BV = min(JOINED, power_of_two(V))
        launch(
            join, b * h * t * -(-V // BV), lengths, sinks, out, parts, sums, capacity, splits,
            **sizes, BV=BV, BS=min(JOINED, power_of_two(splits)), num_warps=4,
        )  # fmt: skip
    return out


def write(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, table: Tensor | None, lengths: Tensor) -> None:
    """Shapes as in `write_pages`."""
    (b, t, G, K), V, page = k.shape, v.shape[3], k_pages.shape[1]
    capacity, n = (page, 0) if table is None else (page * table.shape[1], table.shape[1])
    launch(
        put, b * t, k_pages, v_pages, k, v, table, lengths,
        *k_pages.stride()[:3], *v_pages.stride()[:3], *k.stride()[:3], *v.stride()[:3], capacity, n,
        T=t, G=G, K=K, V=V, PAGE=page, BLOCK=min(1024, power_of_two(G * max(K, V))), num_warps=4,
    )  # fmt: skip


@lru_cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter: enough that there is something to join
    return torch.cuda.get_device_properties(device).multi_processor_count
