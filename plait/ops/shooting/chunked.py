"""Multiple shooting with chunks as a batch, on any device, for any cell.

The tokens are cut into chunks; all chunks run at once, as rows of a batch, from guessed start states. Where the end of a
chunk misses the start of the next, Newton's linear model moves the starts (with the exact Jacobian of a chunk where units are
alone or heads small, with the path through the cell where they are not), and the chunks run again, until every joint is
closed. Inside a chunk the recurrence is always exact, so the gap at the joints is all the error there is; after k passes the
first k chunks are exact whatever the cell does. Where passes do not close the gap, the tokens run one by one.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.ops.graph import autograd_inside
from plait.ops.packing import Chunks, Packing, chunks
from plait.ops.shooting.cells import Bound
from plait.ops.shooting.jacobian import apply, blocks, chunk_jacobians, multiply, partials, slices

MAX_PASSES = 8  # contracting cells take 2 to 4 (shooting.md); more is a cell for which the loop is the better solver
FORGETS = (
    1e-2  # a first gap below which a chunk is run again from the ends as they are: a Jacobian costs several passes
)
FEWEST = 4  # chunks of a sequence: half of one to guess by and two passes are two and a half
ALONE = 1 << 15  # numbers per step from which on one step keeps the machine busy, so that chunks only add work


class Solved(NamedTuple):
    """Every state (c, n, s, h, k), and how it came about."""

    states: Tensor
    passes: int
    gap: float
    fell_back: bool


class Engine(NamedTuple):
    """How chunks advance: `run(cell, x, s)` as below, `back(cell, x, before)` as `Back`, and `size(length, tokens, numbers)`,
    the tokens of a chunk for sequences of `length`, `tokens` in all, of so many numbers each."""

    run: Callable[[Bound, Tensor, Tensor], Tensor]
    back: Callable[[Bound, Tensor, Tensor], Any]
    size: Callable[[int, int, int], int]


def chunk_size(length: int, tokens: int, numbers: int) -> int:
    """A power of two near the square root of the length: as many steps inside a chunk as there are joints to close."""
    if tokens // length * numbers >= ALONE:
        return length
    return min(length, max(16, 2 ** round(math.log2(length) / 2)))


def layout_of(x: Tensor, packing: Packing | None, engine: Engine, one_chunk: bool = False) -> Chunks:
    """Chunks of a call; `one_chunk`: every sequence is one."""
    b, t = x.shape[:2]
    longest = t if packing is None else max(packing.lengths)
    size = engine.size(longest, b * t, x[0, 0].numel())
    return chunks(b, t, longest if one_chunk or longest < FEWEST * size else size, packing)


def forward(
    cell: Bound,
    x: Tensor,
    h0: Tensor,
    packing: Packing | None,
    tol: float,
    max_passes: int | None,
    engine: Engine,
    one_chunk: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Solved]:
    """x (b, t, g, h, k), h0 (n, s, h, k) -> h (b, t, h, k), the other states (b, t, s - 1, h, k), the last states of
    each sequence (n, s, h, k), the record; where it says `fell_back`, all are only what the passes came to."""
    layout = layout_of(x, packing, engine, one_chunk)
    solved = solve(cell, layout.by_step(x), layout.sort(h0), layout, tol, max_passes or MAX_PASSES, engine)
    final = layout.unsort(solved.states[layout.last])
    h, rest = (
        _apart(layout.from_steps(part), solved.states) for part in (solved.states[:, :, 0], solved.states[:, :, 1:])
    )
    return h, rest, final, solved


def _apart(part: Tensor, of: Tensor) -> Tensor:
    """Contiguous, and in memory of its own: an operator's outputs may not share theirs."""
    shared = part.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()
    return part.clone(memory_format=torch.contiguous_format) if shared else part.contiguous()


def run(cell: Bound, x: Tensor, s: Tensor) -> Tensor:
    """The recurrence through every chunk: x (c, n, g, h, k), starts s (n, s, h, k) -> states (c, n, s, h, k)."""
    states = s.new_empty(len(x), *s.shape)
    parts = s.unbind(1)
    for tokens, into in zip(x.unbind(0), states.unbind(0), strict=True):
        parts = cell.cell.advance(tokens, cell, parts, into)
    return states


def solve(cell: Bound, x: Tensor, first: Tensor, layout: Chunks, tol: float, max_passes: int, engine: Engine) -> Solved:
    """Passes until the joints close; `fell_back` where they do not."""
    if len(layout.alive) == 1:
        return Solved(engine.run(cell, x, first), 1, 0.0, False)
    burn = len(x) // 2  # a chunk's end remembers little of its start if the cell forgets: half a pass for a good guess
    guess = cell.cell.start_like(first, x.shape[1])
    s = following(engine.run(cell, x[-burn:], guess)[-1], first, layout)
    gaps: list[float] = []
    while len(gaps) < max_passes:
        states = engine.run(cell, x, s)
        gaps.append(_gap(states[-1], s, layout))
        if gaps[-1] <= tol:
            return Solved(states, len(gaps), gaps[-1], False)
        if not math.isfinite(gaps[-1]) or len(gaps) == max_passes or (len(gaps) > 3 and gaps[-1] > gaps[-3] / 2):
            break
        if gaps[-1] < FORGETS and len(gaps) == 1:  # what half a chunk left over, a whole one most likely takes away
            s = following(states[-1], first, layout)
            continue
        before = torch.cat([s[None], states[:-1]])
        s = close(chunk_jacobians(cell, x, before), states[-1], s, layout, blocks(cell))
    return Solved(states, len(gaps), gaps[-1], True)


def following(ends: Tensor, first: Tensor, layout: Chunks) -> Tensor:
    """Each chunk's start from the end of the chunk before it; `first` (d, ...) for the first chunks."""
    starts, groups = [first], ends.split(list(layout.alive))
    for group, alive in zip(groups, layout.alive[1:], strict=False):
        starts.append(group[:alive])
    return torch.cat(starts)


def _gap(ends: Tensor, s: Tensor, layout: Chunks) -> float:
    """The largest miss at a joint, in units of the state or of 1, whichever is larger."""
    d = layout.alive[0]
    want = following(ends, s[:d], layout)
    return float(((want - s).abs() / want.abs().clamp(min=1))[d:].amax())


def close(J: Tensor, ends: Tensor, s: Tensor, layout: Chunks, block: bool) -> Tensor:
    """Newton's starts: s'_{c+1} = e_c + J_c (s'_c - s_c) along the chunks of every sequence."""
    counts = list(layout.alive)
    products = J.split(counts, 0 if block else 2)
    old, starts = s.split(counts), [s[: counts[0]]]
    for c, alive in enumerate(counts[1:]):
        moved = ends[sum(counts[:c]) : sum(counts[: c + 1])] + apply(products[c], starts[c] - old[c], block)
        starts.append(moved[:alive])
    return torch.cat(starts)


# the way back: mu_t = J_t^T nu_t, nu_{t-1} = g_{t-1} + mu_t, linear, so nothing has to be guessed where J is exact


class Back:
    """One backward pass over chunks x (c, n, g, h, k) with the states before every token (c, n, s, h, k)."""

    def __init__(self, cell: Bound, x: Tensor, before: Tensor):
        self.cell, self.x, self.before = cell, x, before
        parts = [partials(cell, x[part], before[part]) for part in slices(x)]
        self.P, self.Q = (torch.cat(both, 2) for both in zip(*parts, strict=True))
        self.nu = torch.empty_like(before)

    def run(self, g: Tensor, mu: Tensor, steps: int) -> Tensor:
        """The first `steps` of every chunk in reverse, mu (n, s, h, k) coming in from behind: mu at the chunk's start."""
        for t in reversed(range(steps)):
            nu = torch.add(g[t], mu, out=self.nu[t])
            mu = torch.einsum("ij...hk,...ihk->...jhk", self.P[:, :, t], nu)
            r = torch.einsum("ig...hk,...ihk->...ghk", self.Q[:, :, t], nu)
            mu[:, 0] += self.cell.unmix(r)
        return mu

    def products(self) -> Tensor:
        """Each chunk's Jacobian, or its part through the cell, (s, s, n, h, k)."""
        total = None
        for t in range(len(self.x)):
            J = self.P[:, :, t]
            if self.cell.diagonal:
                mixed = torch.einsum("ig...,g...->i...", self.Q[:, :, t], self.cell.recurrent[:, None])
                J = torch.cat([J[:, :1] + mixed[:, None], J[:, 1:]], 1)
            total = J if total is None else multiply(J, total)
        assert total is not None
        return total

    def pull(self) -> tuple[Tensor, list[Tensor]]:
        """Gradients at x and the cell's tensors, from the last `run` over whole chunks."""
        dx, totals = torch.empty_like(self.x), [torch.zeros_like(w) for w in self.cell.tensors()]
        for part in slices(self.x):
            with autograd_inside():
                tokens = self.x[part].detach().requires_grad_()
                tensors = [w.detach().requires_grad_() for w in self.cell.tensors()]
                new = self.cell.with_tensors(tensors).step(tokens, self.before[part].detach())
                gradients = torch.autograd.grad(new, [tokens, *tensors], self.nu[part])
            dx[part] = gradients[0]
            for total, gradient in zip(totals, gradients[1:], strict=True):
                total += gradient
        return dx, totals


TORCH = Engine(run, Back, chunk_size)


def backward(
    cell: Bound,
    x: Tensor,
    h0: Tensor,
    states: Tensor,
    grad: Tensor,
    grad_final: Tensor | None,
    packing: Packing | None,
    tol: float,
    max_passes: int | None,
    engine: Engine,
    one_chunk: bool = False,
) -> list[Tensor]:
    """Gradients at x, h0 and the cell's tensors. states (b, t, s, h, k) as solved; grad (b, t, h, k) at the outputs,
    grad_final (n, s, h, k) at the last states."""
    layout = layout_of(x, packing, engine, one_chunk)
    tokens, steps, first = layout.by_step(x), layout.by_step(states), layout.sort(h0)
    g = torch.zeros_like(steps)
    g[:, :, 0] = layout.by_step(grad)
    if grad_final is not None:
        g[layout.last] += layout.sort(grad_final)
    back = engine.back(cell, tokens, torch.cat([following(steps[-1], first, layout)[None], steps[:-1]]))
    mu = solve_back(back, g, layout, tol, max_passes or MAX_PASSES, cell.diagonal)
    if mu is None:
        warnings.warn(
            f"{type(cell.cell).__name__}: gradients do not settle in chunks; they are taken token by token, which is slow",
            RuntimeWarning,
            stacklevel=2,
        )
        return backward(cell, x, h0, states, grad, grad_final, packing, tol, max_passes, engine, one_chunk=True)
    dx, tensors = back.pull()
    return [layout.from_steps(dx), layout.unsort(mu[: layout.alive[0]]), *tensors]


def solve_back(back: Any, g: Tensor, layout: Chunks, tol: float, max_passes: int, exact: bool) -> Tensor | None:
    """mu (n, s, h, k) at every chunk's start, or None where the joints do not close. `exact`: the products are."""
    mu = torch.zeros_like(g[0])
    if len(layout.alive) == 1:
        return back.run(g, mu, len(g))
    starts = back.run(g, mu, len(g) if exact else len(g) // 2)
    mu = close_back(back.products(), starts, mu, layout) if exact else preceding(starts, layout)
    gaps: list[float] = []
    while len(gaps) < max_passes:
        starts = back.run(g, mu, len(g))
        want = preceding(starts, layout)
        gaps.append(float((want - mu).abs().amax() / want.abs().amax().clamp(min=torch.finfo(g.dtype).tiny)))
        if gaps[-1] <= tol:
            return starts
        if not math.isfinite(gaps[-1]) or (len(gaps) > 3 and gaps[-1] > gaps[-3] / 2):
            return None
        mu = close_back(back.products(), starts, mu, layout)
    return None


def preceding(starts: Tensor, layout: Chunks) -> Tensor:
    """What comes into each chunk from behind: mu at the start of the chunk after it, 0 for the last of a sequence."""
    counts, groups = list(layout.alive), starts.split(list(layout.alive))
    into = torch.zeros_like(starts)
    for c, group in enumerate(groups[1:]):
        place = sum(counts[:c])
        into[place : place + len(group)] = group
    return into


def close_back(J: Tensor, starts: Tensor, mu: Tensor, layout: Chunks) -> Tensor:
    """mu'_c = starts_{c+1} + J_{c+1}^T (mu'_{c+1} - mu_{c+1}), from the last chunk to the first."""
    counts = list(layout.alive)
    places = [sum(counts[:c]) for c in range(len(counts))]
    new = torch.zeros_like(mu)
    for c in reversed(range(1, len(counts))):
        chunk = slice(places[c], places[c] + counts[c])
        value = starts[chunk] + apply(J[:, :, chunk], new[chunk] - mu[chunk], False, transposed=True)
        new[places[c - 1] : places[c - 1] + counts[c]] = value
    return new
