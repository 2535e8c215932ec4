"""The elementwise recurrence in chunks of 16 tokens, all chunks side by side.

A chunk started from zero ends in L and multiplies what stood before it by P, the product of its a. The ends of all chunks are
the same recurrence over a sixteenth of the tokens, s <- P s + L, and are found in the same way; from them every chunk runs once
more, now from its true start. So nothing is ever divided by a product, and 2,048 tokens take about 100 operations.

Its gradient is the recurrence run backwards: with g_t what reaches s_t, g_t = dy_t + a_{t+1} g_{t+1}, db = g, da_t = g_t
s_{t-1}. Only a, the states and the first of them are kept for it.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from plait.ops.decay import FLOOR
from plait.ops.graph import gradient, one_step
from plait.ops.operator import operator
from plait.ops.packing import Packing

Scan = Callable[[Tensor, Tensor, Tensor], Tensor]

CHUNK = 16  # a power of two; measured against 8, 32 and 64 for 64 to 1,024 channels: within a tenth of the best of them


def run(
    a: Tensor,
    b: Tensor,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
    at: Tensor | None = None,
    scan: Scan | None = None,
) -> tuple[Tensor, Tensor | None, *tuple[Tensor, ...]]:
    """Shapes as in `scan`. scan: other than in chunks, of `differentiable`."""
    scan = scan or _scan
    if packing is not None:
        return _packed(a, b, state, packing, scan)
    states = scan(a, b, b.new_zeros(b[:, 0].shape) if state is None else state)
    last = None if state is None else states[:, -1].clone()  # which shall not keep all others in memory
    return (states, last) if at is None else (states, last, states[:, at])


def _packed(a: Tensor, b: Tensor, state: Tensor | None, packing: Packing, scan: Scan) -> tuple[Tensor, Tensor | None]:
    """A document's first token forgets what was before it, or finds its own state there."""
    first = starts(packing, b.ndim)
    if state is not None:
        b = b + torch.where(first, a * state[packing.documents], 0.0)
    states = scan(torch.where(first, 0.0, a), b, b.new_zeros(b[:, 0].shape))
    return states, None if state is None else states[0, packing.cuts[1:] - 1]


def starts(packing: Packing, ndim: int) -> Tensor:
    """Which tokens (1, t, ...) are the first of their document."""
    return (packing.offsets == 0).view(1, -1, *[1] * (ndim - 2))


def differentiable(forward: Scan, backward: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Scan:
    """All states of (a, b, s), as `forward` gives them; `backward` gives the gradients at a and b of (dy, a, states, s)."""

    class Whole(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
            states = forward(a, b, s)
            ctx.save_for_backward(a, states, s)
            return states

        @staticmethod
        @gradient
        def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
            a, states, s = ctx.saved_tensors
            da, db = backward(dy, a, states, s)
            return da, db, a[:, 0] * db[:, 0]

    return one_step(Whole)


# Operators: drawn into a graph, the levels of a scan are some hundred steps that take a minute to compile, run no faster for
# it on a CPU, and are those of one length alone.


@operator("scan")
def _forward(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    return scanned(a, b, s)


@torch.library.register_fake("plait::scan")
def _(a, b, s):
    return b.new_empty(b.shape)


@operator("scan_backward")
def _backward(dy: Tensor, a: Tensor, states: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    g = dy[:, -1:].clone()
    if dy.shape[1] > 1:
        g = torch.cat([scanned(a[:, 1:], dy[:, :-1], g[:, 0], back=True), g], 1)
    return torch.cat([s[:, None], states[:, :-1]], 1).mul_(g), g


@torch.library.register_fake("plait::scan_backward")
def _(dy, a, states, s):
    return a.new_empty(a.shape), dy.new_empty(dy.shape)


_scan = differentiable(_forward, _backward)


def scanned(
    a: Float[Tensor, "b t *u"], b: Float[Tensor, "b t *u"], s: Float[Tensor, "b *u"], back: bool = False
) -> Float[Tensor, "b t *u"]:
    """All states from s before the first token on; `back`: s after the last token, and from there to the first."""
    t = a.shape[1]
    if t < 2 * CHUNK:
        return torch.stack(_steps(a.unbind(1), b.unbind(1), s, back), 1)
    rest = t % CHUNK
    if rest == 0:
        return _chunks(a, b, s, back)
    cut = rest if back else t - rest  # what fills no chunk comes last
    (a0, a1), (b0, b1) = (x.tensor_split((cut,), 1) for x in (a, b))
    if back:
        late = _chunks(a1, b1, s, back)
        return torch.cat([scanned(a0, b0, late[:, 0], back), late], 1)
    early = _chunks(a0, b0, s, back)
    return torch.cat([early, scanned(a1, b1, early[:, -1], back)], 1)


def _chunks(a: Tensor, b: Tensor, s: Tensor, back: bool) -> Tensor:
    """`scanned` of whole chunks."""
    a, b = (x.unflatten(1, (-1, CHUNK)) for x in (a, b))  # (b, n, c, *u)
    steps = a.unbind(2), b.unbind(2)
    end, first = (0, -1) if back else (-1, 0)
    L = steps[1][first]
    for x, y in zip(*(_ordered(part, back)[1:] for part in steps), strict=True):
        L = torch.addcmul(y, x, L)
    ends = scanned(_product(a), L, s, back)
    before = torch.cat([ends[:, 1:], s[:, None]] if back else [s[:, None], ends[:, :-1]], 1)
    inside = slice(1, None) if back else slice(None, -1)
    states = _steps(steps[0][inside], steps[1][inside], before, back)
    states.insert(end % CHUNK, ends)
    return torch.stack(states, 2).flatten(1, 2)


def _steps(a: tuple[Tensor, ...], b: tuple[Tensor, ...], s: Tensor, back: bool) -> list[Tensor]:
    """The states after each step, in the order of a and b."""
    states = []
    for x, y in zip(_ordered(a, back), _ordered(b, back), strict=True):
        s = torch.addcmul(y, x, s)
        states.append(s)
    return states[::-1] if back else states


def _ordered(steps: tuple[Tensor, ...], back: bool) -> tuple[Tensor, ...]:
    return steps[::-1] if back else steps


def _product(a: Float[Tensor, "b n c *u"]) -> Float[Tensor, "b n *u"]:
    """Of a chunk, 0 where it is below the floor of decays (plait.ops.decay), so that none is subnormal."""
    floor = math.exp(FLOOR[a.dtype])
    while a.shape[2] > 1:
        first, second = a.chunk(2, 2)
        a = F.hardshrink(first * second, floor)
    return a.squeeze(2)
