"""One step back in time, and what it reads."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# (it reads kernels as Python, in which triton's functions only raise)

import triton
import triton.language as tl

from plait.ops.shooting.triton.tiles import times


@triton.jit
def transposed(a, S: tl.constexpr):
    out = ()
    for i in tl.static_range(S):
        for j in tl.static_range(S):
            out = out + (a[j * S + i],)
    return out


@triton.jit
def states_at(h, rest, here, there, exists, S: tl.constexpr, D: tl.constexpr, BACK: tl.constexpr, N: tl.constexpr):
    """All states of the N tokens BACK, BACK + 1, .. before the one at `here`, (step, state) flattened, unconverted."""
    loaded = ()
    for u in tl.static_range(N):
        loaded = loaded + (tl.load((h + here) - (BACK + u) * D, mask=exists),)
        for i in tl.static_range(1, S):
            loaded = loaded + (tl.load((rest + there) - ((BACK + u) * (S - 1) - (i - 1)) * D, mask=exists),)
    return loaded


@triton.jit
def gradients_at(dh, like, here, exists, D: tl.constexpr, N: tl.constexpr):
    """The outputs' gradients of the N tokens from `here` back, or zeros."""
    loaded = (like * 0.0,) * N
    if dh is not None:
        loaded = ()
        for u in tl.static_range(N):
            loaded = loaded + (tl.load((dh + here) - u * D, mask=exists),)
    return loaded


@triton.jit
def back(
    inputs, old, gradient, lam, total, maps, w, dx, stride_g, mask,
    S: tl.constexpr, G: tl.constexpr, W: tl.constexpr, V: tl.constexpr, JACOBIAN: tl.constexpr, VJP: tl.constexpr,
    MAPS: tl.constexpr,
):  # fmt: skip
    """One step: lambda before it, and either the map to there so far or the gradients that it leaves behind."""
    lam = (lam[0] + gradient.to(tl.float32),) + lam[1:]
    if MAPS:
        _, by = JACOBIAN(inputs, old, w, V)
        by = transposed(by, S)
        lam = times(by, lam, S, 1)
        maps = times(by, maps, S, S)
    else:
        lam, grads, more = VJP(inputs, old, w, lam, V)
        for g in tl.static_range(G):
            tl.store(dx + g * stride_g, grads[g].to(dx.dtype.element_ty), mask=mask)
        sums = ()
        for i in tl.static_range(W):
            sums = sums + (total[i] + more[i],)
        total = sums
    return lam, total, maps
