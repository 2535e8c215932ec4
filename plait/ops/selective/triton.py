"""The selective scan over many tokens as Triton kernels: states never leave a processor, but for one in every `SEGMENT`.

A program walks along the tokens of a row with some channels' states in registers; the next token is read while this one is
worked on. For the gradient a program goes from the last segment to the first: it makes the segment's states anew, puts them
where they still lie in the cache when it walks back, and sums what its channels give to B, C and A.

    g_t = C_t dy_t + a_{t+1} g_{t+1}    dC = h dy    dB = g u    du = g B    d(dt A) = a h_{t-1} g        with u = dt x
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportReturnType=false
# (it reads kernels as Python, in which triton's functions only raise)

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.ops.launch import kernel, launch

SEGMENT = 64  # tokens
NUMBERS = 256  # of states in a program, which is one warp: sums over channels and over states stay within it


@triton.jit
def token_of(x, first, t, tokens, c, W: tl.constexpr):
    """The W numbers of a token of the row that begins at `first`; zeros outside of its tokens."""
    return tl.load(x + (first + t) * W + c, mask=(c < W) & (t < tokens), other=0.0)


@triton.jit
def keep(x, first, t, c, W: tl.constexpr, y):
    tl.store(x + (first + t) * W + c, y, mask=c < W)


@triton.jit
def decays(offsets, t, step, rates):
    """a, 0 where a document begins."""
    kept = tl.exp(step[:, None] * rates)
    return kept if offsets is None else tl.where(tl.load(offsets + t) > 0, kept, 0.0)


@kernel
def forth(
    dt, u, B, C, A, h, offsets, y, last, before, tokens,
    D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """A program does BD channels of one row."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first, segments = row * tokens, (tokens + SEGMENT - 1) // SEGMENT
    d, k = tl.program_id(0) % blocks * BD + tl.arange(0, BD), tl.arange(0, BK)
    exists, place = (d < D)[:, None] & (k < K)[None, :], d[:, None] * K + k[None, :]
    rates = tl.load(A + place, mask=exists, other=0.0)
    state = tl.zeros([BD, BK], tl.float32)
    if h is not None:
        state += tl.load(h + row * D * K + place, mask=exists, other=0.0)
    next_dt, next_u = token_of(dt, first, 0, tokens, d, D), token_of(u, first, 0, tokens, d, D)
    next_B, next_C = token_of(B, first, 0, tokens, k, K), token_of(C, first, 0, tokens, k, K)
    for t in range(0, tokens):
        if t % SEGMENT == 0:
            tl.store(before + (row * segments + t // SEGMENT) * D * K + place, state, mask=exists)
        step, add, write, read = next_dt, next_u, next_B, next_C
        next_dt, next_u = token_of(dt, first, t + 1, tokens, d, D), token_of(u, first, t + 1, tokens, d, D)
        next_B, next_C = token_of(B, first, t + 1, tokens, k, K), token_of(C, first, t + 1, tokens, k, K)
        state = decays(offsets, t, step, rates) * state + add[:, None] * write[None, :]
        keep(y, first, t, d, D, tl.sum(state * read[None, :], 1))
    tl.store(last + row * D * K + place, state, mask=exists)


@kernel
def back(
    dy, dlast, dt, u, B, C, A, offsets, before, room, ddt, du, dB, dC, dA, dh, tokens,
    D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """dB and dC are (blocks of channels, b, t, k), dA (b, d, k): what each program gives. room (programs, SEGMENT, BD, BK)."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    first, segments = row * tokens, (tokens + SEGMENT - 1) // SEGMENT
    mine = (block * (tl.num_programs(0) // blocks) + row) * tokens  # where dB and dC of this program begin
    d, k = block * BD + tl.arange(0, BD), tl.arange(0, BK)
    exists, place = (d < D)[:, None] & (k < K)[None, :], d[:, None] * K + k[None, :]
    rates = tl.load(A + place, mask=exists, other=0.0)
    g, drates = (
        tl.zeros([BD, BK], tl.float32),
        tl.zeros([BD, BK], tl.float32),
    )  # g: what reaches a state from later tokens
    if dlast is not None:
        g += tl.load(dlast + row * D * K + place, mask=exists, other=0.0)
    room += tl.program_id(0).to(tl.int64) * SEGMENT * BD * BK + tl.arange(0, BD)[:, None] * BK + k[None, :]
    for turn in range(0, segments):
        start = (segments - 1 - turn) * SEGMENT
        count = tl.minimum(tokens - start, SEGMENT)
        state = tl.load(before + (row * segments + segments - 1 - turn) * D * K + place, mask=exists, other=0.0)
        next_dt, next_u = token_of(dt, first, start, tokens, d, D), token_of(u, first, start, tokens, d, D)
        next_B = token_of(B, first, start, tokens, k, K)
        for i in range(0, count):
            t = start + i
            tl.store(room + i * BD * BK, state)
            step, add, write = next_dt, next_u, next_B
            next_dt, next_u = token_of(dt, first, t + 1, tokens, d, D), token_of(u, first, t + 1, tokens, d, D)
            next_B = token_of(B, first, t + 1, tokens, k, K)
            state = decays(offsets, t, step, rates) * state + add[:, None] * write[None, :]
        tl.debug_barrier()  # threads may read what others have put there
        for i in range(0, count):
            t = start + count - 1 - i
            step, add = token_of(dt, first, t, tokens, d, D), token_of(u, first, t, tokens, d, D)
            write, read = token_of(B, first, t, tokens, k, K), token_of(C, first, t, tokens, k, K)
            asked = token_of(dy, first, t, tokens, d, D)
            earlier, kept = tl.load(room + (count - 1 - i) * BD * BK), decays(offsets, t, step, rates)
            g += asked[:, None] * read[None, :]
            keep(dC, mine, t, k, K, tl.sum((kept * earlier + add[:, None] * write[None, :]) * asked[:, None], 0))
            keep(dB, mine, t, k, K, tl.sum(g * add[:, None], 0))
            keep(du, first, t, d, D, tl.sum(g * write[None, :], 1))
            g *= kept
            dlog = g * earlier  # at dt A
            keep(ddt, first, t, d, D, tl.sum(dlog * rates, 1))
            drates += dlog * step[:, None]
        tl.debug_barrier()
    tl.store(dA + row * D * K + place, drates, mask=exists)
    tl.store(dh + row * D * K + place, g, mask=exists)


def forward(
    dt: Tensor, u: Tensor, B: Tensor, C: Tensor, A: Tensor, h: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `plait.ops.selective.tokens`; all float32."""
    (b, t, D), K = dt.shape, A.shape[1]
    y, last, before = (torch.empty(b, *n, device=dt.device) for n in ((t, D), (D, K), (-(-t // SEGMENT), D, K)))
    given = [None if x is None else x.contiguous() for x in (dt, u, B, C, A, h)]
    programs, sizes = _sizes(dt, A)
    launch(forth, programs, *given, offsets, y, last, before, t, **sizes, num_warps=1)
    return y, last, before


def backward(
    dy: Tensor,
    dlast: Tensor | None,
    dt: Tensor,
    u: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    offsets: Tensor | None,
    before: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients at dt, u, B, C, A and the first state."""
    (b, t, D), K = dt.shape, A.shape[1]
    programs, sizes = _sizes(dt, A)
    room = torch.empty(programs, SEGMENT, sizes["BD"], sizes["BK"], device=dt.device)
    ddt, du = (torch.empty(b, t, D, device=dt.device) for _ in range(2))
    dB, dC = (torch.empty(-(-D // sizes["BD"]), b, t, K, device=dt.device) for _ in range(2))
    dA, dh = (torch.empty(b, D, K, device=dt.device) for _ in range(2))
    given = [None if x is None else x.contiguous() for x in (dy, dlast, dt, u, B, C, A)]
    launch(back, programs, *given, offsets, before, room, ddt, du, dB, dC, dA, dh, t, **sizes, num_warps=1)
    return ddt, du, dB.sum(0), dC.sum(0), dA.sum(0), dh


def _sizes(dt: Tensor, A: Tensor) -> tuple[int, dict[str, int]]:
    """Programs, and what is compiled in."""
    D, K = A.shape
    BK = triton.next_power_of_2(K)
    BD = min(max(NUMBERS // BK, 1), triton.next_power_of_2(D))
    return len(dt) * -(-D // BD), {"D": D, "K": K, "BD": BD, "BK": BK, "SEGMENT": SEGMENT}
