"""Newton's method over all T states at once: what the literature does.

All states h_1 .. h_T are unknowns of h_t = f(h_{t-1}, x_t). A pass evaluates f and its Jacobians J_t along the current
guess, at every token, and solves the linear model in a scan. With r_t = f(h_{t-1}) - h_t the changes are

    d_t = J_t d_{t-1} + r_t.

deer takes the exact J (arXiv 2309.12252), quasi_deer its diagonal (arXiv 2407.19115). elk and quasi_elk add that large
changes cost: a Kalman filter takes "d_t is 0, with variance 1 / lambda" for an observation (arXiv 2407.19115, section 4;
in a scan, arXiv 1905.13002). The filter's means are used, as in the authors' code. The smoother's, which are Levenberg and
Marquardt's step to the letter, did no better here, and on an LSTM that remembers for long far worse; with their test that
the residual must fall at each step, few cells converged, since it may well grow on the way to a solution that is near.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines import linear
from plait.ops.shooting import Bound
from plait.ops.shooting.jacobian import partials

SOLVERS = ("deer", "quasi_deer", "elk", "quasi_elk")
LARGEST = 1e8  # where deer's code cuts states off, so that a diverged guess stays a number


@torch.no_grad()
def solve(
    cell: Bound,
    x: Tensor,
    h0: Tensor,
    solver: str,
    tol: float,
    max_passes: int | None = None,
) -> tuple[Tensor, int, Tensor]:
    """x (n, t, g, h, k), h0 (n, s, h, k) -> all states (n, t, s, h, k), passes, and the largest residual left (0-d).

    Stops once |f(h_{t-1}) - h_t| / max(1, |h_t|) is at most `tol` everywhere, or after `max_passes`, T by default. T passes
    of deer or quasi_deer always end in the exact states: after k passes the first k are those of the loop. A residual that
    is no number counts as infinite.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
    x = x.detach().transpose(0, 1)  # time first, here and below
    layout = _Layout(cell, diagonal=solver.startswith("quasi"))
    damping = _Damping(cell) if solver.endswith("elk") else None
    h, passes = first_guess(cell, x), 0
    while True:
        before = torch.cat([h0.detach()[None].to(h), h[:-1]])
        new = cell.step(x, before)
        residual = new - h
        gap = (residual.abs() / h.abs().clamp(min=1.0)).nan_to_num(torch.inf).amax()
        if passes >= (len(x) if max_passes is None else max_passes) or gap <= tol:
            return h.transpose(0, 1), passes, gap
        J, r = layout.jacobians(x, before), layout.pack(residual)
        kept = None if damping is None else damping.after(residual)
        d = linear.scan(J, r) if kept is None else filtered(J, r, layout.pack_one(kept))
        new = new + layout.unpack(linear.apply(J, linear.shift(d)))  # not h + d: exact where all before it is
        h = new if kept is None else torch.lerp(new, h, kept)
        h = h.nan_to_num(0.0).clamp(-LARGEST, LARGEST)
        passes += 1


def first_guess(cell: Bound, x: Tensor) -> Tensor:
    """What each token alone makes of the cell's start: ParaRNN's guess. x (t, n, g, h, k) -> (t, n, s, h, k)."""
    return cell.step(x, cell.cell.start_like(x, x.shape[1]).expand(len(x), -1, -1, -1, -1))


@dataclass(frozen=True)
class _Layout:
    """Where states (t, n, s, h, k) and Jacobians lie in the scans.

    Jacobians are numbers where units and states are alone, (t, n, s, h, k); s x s for each unit, (t, n, h, k, s, s); or
    s k x s k for each head, (t, n, h, s k, s k). A dense recurrence is one head.
    """

    cell: Bound
    diagonal: bool

    @property
    def states(self) -> int:
        return len(self.cell.cell.states)

    @property
    def numbers(self) -> bool:
        return self.diagonal or (self.cell.diagonal and self.states == 1)

    def pack(self, v: Tensor) -> Tensor:
        if self.numbers:
            return v
        return v.movedim(-3, -1) if self.cell.diagonal else v.transpose(-3, -2).flatten(-2)

    def unpack(self, v: Tensor) -> Tensor:
        if self.numbers:
            return v
        return v.movedim(-1, -3) if self.cell.diagonal else v.unflatten(-1, (self.states, -1)).transpose(-3, -2)

    def pack_one(self, v: Tensor) -> Tensor:
        """A number for each unit (n, 1, h, k) or head (n, 1, h, 1), against packed vectors."""
        if self.numbers:
            return v
        return v[:, 0, ..., None] if self.cell.diagonal else v[:, 0]

    def jacobians(self, x: Tensor, before: Tensor) -> Tensor:
        """df/dh at every token: the step's own derivatives, and R where it reads h."""
        P, Q = partials(self.cell, x, before)  # (s, s, t, n, h, k), (s, g, t, n, h, k)
        R = self.cell.recurrent
        if self.numbers:
            own = R if self.cell.diagonal else R.diagonal(dim1=-2, dim2=-1)
            J = P.diagonal().movedim(-1, -3).clone()
            J[..., 0, :, :] += torch.einsum("gtnhk,ghk->tnhk", Q[0], own)
        elif self.cell.diagonal:
            P[:, 0] += torch.einsum("igtnhk,ghk->itnhk", Q, R)
            J = P.movedim((0, 1), (-2, -1)).contiguous()
        else:
            J = torch.diag_embed(P.movedim((0, 1), (-3, -2))).transpose(-3, -2).contiguous()  # (t, n, h, s, k, s, k)
            J[..., 0, :] += torch.einsum("igtnhk,ghkl->tnhikl", Q, R)
            J = J.flatten(-2).flatten(-3, -2)
        return J


class _Damping:
    """lambda of each recurrence that stands alone (a unit's or a head's), from how its residual goes: Marquardt's rule.

    The best constant was 1e-8 for one cell and 1e-4 for another, and none lets the last passes converge as Newton's do. So
    lambda starts between, and is a tenth after a change that helped, ten times as much after one that did not; at most 1,
    where each pass still halves the error of the first wrong state.
    """

    start, least, most = 1e-6, 1e-12, 1.0

    def __init__(self, cell: Bound) -> None:
        self.over = (0, 2) if cell.diagonal else (0, 2, 4)  # time, states, and units that hear each other
        self.value: Tensor | None = None
        self.size: Tensor | None = None

    def after(self, residual: Tensor) -> Tensor:
        """The share of a change that is taken back, lambda / (1 + lambda): (n, 1, h, k) or (n, 1, h, 1)."""
        size = linear.finite(residual).square().sum(self.over, keepdim=True)[0]
        if self.value is None or self.size is None:
            self.value = torch.full_like(size, self.start)
        else:
            self.value = (self.value * torch.where(size < self.size, 0.1, 10.0)).clamp(self.least, self.most)
        self.size = size
        return self.value / (1 + self.value)


def filtered(J: Tensor, r: Tensor, kept: Tensor) -> Tensor:
    """Kalman's means of d_t = J_t d_{t-1} + r_t + noise of variance 1, where every d_t is seen to be 0.

    J, r as in `linear`; kept: the observation's gain, against r without time. A step is (A, eta, info, mean, cov) of arXiv
    1905.13002, section III: A, mean and cov of the state after it given the one before, and what it tells of that one.
    """
    matrix = linear.matrices(J, r)
    times, turned = (torch.matmul, lambda M: M.mT) if matrix else (torch.mul, lambda M: M)
    eye = torch.eye(J.shape[-1], dtype=J.dtype, device=J.device) if matrix else torch.ones_like(J[:1])

    def shrinkage(cov: Tensor, info: Tensor) -> Tensor:
        """(1 + cov info)^-1: how a state of that covariance moves by what is told of it later."""
        both = eye + times(cov, info)
        return linear.finite(torch.linalg.inv_ex(both).inverse) if matrix else 1 / both

    def advance(mean: Tensor, cov: Tensor, moved: Tensor, step: linear.Parts) -> linear.Parts:
        A = times(step[0], moved)
        mean = linear.apply(A, mean + linear.apply(cov, step[1])) + step[3]
        return linear.finite(mean), linear.finite(times(times(A, cov), turned(step[0])) + step[4])

    def follow(state: linear.Parts, step: linear.Parts) -> linear.Parts:
        mean, cov = state
        return advance(mean, cov, shrinkage(cov, step[2]), step)

    def merge(first: linear.Parts, then: linear.Parts) -> linear.Parts:
        A, eta, info, mean, cov = first
        moved = shrinkage(cov, then[2])
        back = turned(times(moved, A))
        eta = linear.apply(back, then[1] - linear.apply(then[2], mean)) + eta
        info = times(times(back, then[2]), A) + info
        A = times(times(then[0], moved), A)
        return linear.finite(A), linear.finite(eta), linear.finite(info), *advance(mean, cov, moved, then)

    J, r = linear.finite(J), linear.finite(r)
    gain = kept[..., None] if matrix else kept
    observed = (-kept * linear.apply(turned(J), r), gain * times(turned(J), J))
    steps = ((1 - gain) * J, *observed, (1 - kept) * r, ((1 - gain) * eye).expand_as(J))
    return linear.prefixes(merge, follow, steps, kept=2)[0]
