"""Diagonal cells on the device: a step, its Jacobian and its vector-Jacobian product, on tiles of channels.

`x`, `s`, `w`, `lam` are tuples of float32 tiles: inputs, states, weights (one recurrent number per input, then the
peepholes) and the gradient at the new states. `V` tells a cell's variants apart. Everything that does not depend on
`lam` is computed apart from it, so that unrolled backward steps overlap and only a few products wait for each other.

Every exponential is `ex2.approx` and every quotient `rcp.approx`: two special-function instructions a sigmoid. tanh(p) is
2 sigmoid(2 p) - 1, right to 1e-7 absolutely, which is what float32 states keep of it.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false, reportAssignmentType=false
# (it reads kernels as Python, in which triton's functions only raise)

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs

from plait.ops.shooting import cells

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAST = tl.constexpr(not knobs.runtime.interpret)  # the interpreter knows no assembly


@triton.jit
def _exp2(x):
    if FAST:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def _log2(x):
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def _inverse(x):
    if FAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def _sigmoid(x, a, s, SCALE: tl.constexpr):
    """sigmoid(SCALE (x + a s)). The scaled `a` does not change over time and the scaled x waits for nobody, so that a
    state is one fused product away from the exponential. An infinite exponential has inverse 0: nothing overflows."""
    return _inverse(1.0 + _exp2(tl.fma(a * (-SCALE * LOG2E), s, x * (-SCALE * LOG2E))))


# --- RNN: V = 0 tanh, 1 relu


@triton.jit
def _rnn(x, s, w, V: tl.constexpr):
    """The new state, and its derivative at the sum."""
    if V == 0:
        h = 2.0 * _sigmoid(x[0], w[0], s[0], 2.0) - 1.0
        slope = 1.0 - h * h
    else:
        p = tl.fma(w[0], s[0], x[0])
        h = tl.where(p < 0.0, 0.0, p)
        slope = tl.where(p > 0.0, 1.0, 0.0)
    return h, slope


@triton.jit
def rnn_step(x, s, w, V: tl.constexpr):
    h, slope = _rnn(x, s, w, V)
    return (h,)


@triton.jit
def rnn_jacobian(x, s, w, V: tl.constexpr):
    h, slope = _rnn(x, s, w, V)
    return (h,), (slope * w[0],)


@triton.jit
def rnn_vjp(x, s, w, lam, V: tl.constexpr):
    h, slope = _rnn(x, s, w, V)
    d = lam[0] * slope
    return (lam[0] * (slope * w[0]),), (d,), (d * s[0],)


# --- GRU


@triton.jit
def gru_gates(x, s, w):
    """z, r, the recurrent part of the candidate, and sigmoid(2 p) of the candidate's sum p."""
    z = _sigmoid(x[0], w[0], s[0], 1.0)
    r = _sigmoid(x[1], w[1], s[0], 1.0)
    half = _inverse(1.0 + _exp2(tl.fma((w[2] * (-2.0 * LOG2E)) * s[0], r, x[2] * (-2.0 * LOG2E))))
    return z, r, w[2] * s[0], half


@triton.jit
def gru_new(h, z, half):
    """h + z (c - h) with c = 2 half - 1: one fused product after the candidate."""
    return tl.fma(2.0 * z, half, h - z * (1.0 + h))


@triton.jit
def _gru_slopes(x, s, w):
    """The new state, its derivatives at the sums of z, r and c, r, and its derivative at the old state."""
    z, r, m, half = gru_gates(x, s, w)
    c = 2.0 * half - 1.0
    at_z = (c - s[0]) * (z * (1.0 - z))
    at_c = z * (1.0 - c * c)
    at_r = at_c * (m * (r * (1.0 - r)))
    slope = (1.0 - z) + at_z * w[0] + at_r * w[1] + (at_c * r) * w[2]
    return gru_new(s[0], z, half), at_z, at_r, at_c, r, slope


@triton.jit
def gru_step(x, s, w, V: tl.constexpr):
    z, r, m, half = gru_gates(x, s, w)
    return (gru_new(s[0], z, half),)


@triton.jit
def gru_jacobian(x, s, w, V: tl.constexpr):
    h, at_z, at_r, at_c, r, slope = _gru_slopes(x, s, w)
    return (h,), (slope,)


@triton.jit
def gru_vjp(x, s, w, lam, V: tl.constexpr):
    h, at_z, at_r, at_c, r, slope = _gru_slopes(x, s, w)
    dz, dr, dc = lam[0] * at_z, lam[0] * at_r, lam[0] * at_c
    return (lam[0] * slope,), (dz, dr, dc), (dz * s[0], dr * s[0], dc * r * s[0])


# --- LSTM: V = coupled + 2 peephole. Inputs f, z, o, (i); peepholes f, o, (i)


@triton.jit
def _lstm(x, s, w, V: tl.constexpr):
    """f, z, i, o, the new cell and its tanh."""
    G: tl.constexpr = 3 if V % 2 == 1 else 4
    f, o = x[0], x[2]
    if V >= 2:  # the old cell is known before the old output, so it goes first
        f = tl.fma(w[G], s[1], f)
    f = _sigmoid(f, w[0], s[0], 1.0)
    z = 2.0 * _sigmoid(x[1], w[1], s[0], 2.0) - 1.0
    if V % 2 == 1:
        i = 1.0 - f
        c = tl.fma(f, s[1] - z, z)
    else:
        i = x[3]
        if V >= 2:
            i = tl.fma(w[G + 2], s[1], i)
        i = _sigmoid(i, w[3], s[0], 1.0)
        c = tl.fma(f, s[1], i * z)
    if V >= 2:
        o = tl.fma(w[2], s[0], o)
        o = _sigmoid(o, w[G + 1], c, 1.0)
    else:
        o = _sigmoid(o, w[2], s[0], 1.0)
    half = _inverse(1.0 + _exp2(c * (-2.0 * LOG2E)))
    return f, z, i, o, c, half


@triton.jit
def _lstm_slopes(x, s, w, V: tl.constexpr):
    """New states; the new cell's derivatives at f, z, i; the new output's at o and at the new cell; the new cell's at the
    old states."""
    G: tl.constexpr = 3 if V % 2 == 1 else 4
    f, z, i, o, c, half = _lstm(x, s, w, V)
    y = 2.0 * half - 1.0
    if V % 2 == 1:
        at_f = (s[1] - z) * (f * i)
        at_i = at_f  # not used
    else:
        at_f = s[1] * (f * (1.0 - f))
        at_i = z * (i * (1.0 - i))
    at_z = i * (1.0 - z * z)
    at_o = y * (o * (1.0 - o))
    at_c = o * (1.0 - y * y)
    by_h = at_f * w[0] + at_z * w[1]
    by_c = f
    if V % 2 == 0:
        by_h += at_i * w[3]
    if V >= 2:
        at_c += at_o * w[G + 1]
        by_c += at_f * w[G]
        if V % 2 == 0:
            by_c += at_i * w[G + 2]
    return (o * y, c), at_f, at_z, at_i, at_o, at_c, by_h, by_c


@triton.jit
def lstm_step(x, s, w, V: tl.constexpr):
    f, z, i, o, c, half = _lstm(x, s, w, V)
    return tl.fma(2.0 * o, half, -o), c


@triton.jit
def lstm_jacobian(x, s, w, V: tl.constexpr):
    new, at_f, at_z, at_i, at_o, at_c, by_h, by_c = _lstm_slopes(x, s, w, V)
    return new, (at_o * w[2] + at_c * by_h, at_c * by_c, by_h, by_c)


@triton.jit
def lstm_vjp(x, s, w, lam, V: tl.constexpr):
    new, at_f, at_z, at_i, at_o, at_c, by_h, by_c = _lstm_slopes(x, s, w, V)
    lam_c = tl.fma(lam[0], at_c, lam[1])
    old = tl.fma(lam_c, by_h, lam[0] * (at_o * w[2])), lam_c * by_c
    df, dz, do = lam_c * at_f, lam_c * at_z, lam[0] * at_o
    dx = (df, dz, do)
    dw = (df * s[0], dz * s[0], do * s[0])
    if V % 2 == 0:
        di = lam_c * at_i
        dx = dx + (di,)
        dw = dw + (di * s[0],)
    if V >= 2:
        dw = dw + (df * s[1], do * new[1])
        if V % 2 == 0:
            dw = dw + (dx[3] * s[1],)
    return old, dx, dw


# --- sLSTM. Inputs i, f, z, o; states h, q, l


@triton.jit
def _slstm(x, s, w):
    """i - u's two sigmoids, max and log, where u = l + log sigmoid(f); exp(-|f|) and f; z; sigmoid(o); the new q."""
    i = tl.fma(w[0], s[0], x[0])
    f = tl.fma(w[1], s[0], x[1])
    z = 2.0 * _sigmoid(x[2], w[2], s[0], 2.0) - 1.0
    o = _sigmoid(x[3], w[3], s[0], 1.0)
    small_f = _exp2(tl.abs(f) * (-LOG2E))
    u = s[2] + tl.minimum(f, 0.0) - LN2 * _log2(1.0 + small_f)
    small = _exp2(tl.abs(u - i) * (-LOG2E))
    large = _inverse(1.0 + small)
    small_part = small * large
    keep = tl.where(u >= i, large, small_part)
    take = tl.where(u >= i, small_part, large)
    log = tl.maximum(u, i) + LN2 * _log2(1.0 + small)
    q = tl.fma(keep, s[1] - z, z)
    return keep, take, z, o, f, small_f, q, log


@triton.jit
def _slstm_slopes(x, s, w):
    """New states; derivatives: of q at w = sigmoid(u - i)'s sum and at z, of log sigmoid at f, of h at o; both parts of
    the quotient; q's and l's derivatives at the old h."""
    keep, take, z, o, f, small_f, q, log = _slstm(x, s, w)
    at_u = (s[1] - z) * (keep * take)
    at_z = take * (1.0 - z * z)
    at_f = tl.where(f >= 0.0, small_f, 1.0) * _inverse(1.0 + small_f)
    at_o = q * (o * (1.0 - o))
    q_h = at_u * (at_f * w[1] - w[0]) + at_z * w[2]
    l_h = (keep * at_f) * w[1] + take * w[0]
    return (o * q, q, log), keep, take, o, at_u, at_z, at_f, at_o, q_h, l_h


@triton.jit
def slstm_step(x, s, w, V: tl.constexpr):
    keep, take, z, o, f, small_f, q, log = _slstm(x, s, w)
    return o * q, q, log


@triton.jit
def slstm_jacobian(x, s, w, V: tl.constexpr):
    new, keep, take, o, at_u, at_z, at_f, at_o, q_h, l_h = _slstm_slopes(x, s, w)
    by_h = (at_o * w[3] + o * q_h, o * keep, o * at_u)
    return new, by_h + (q_h, keep, at_u) + (l_h, tl.zeros_like(keep), keep)


@triton.jit
def slstm_vjp(x, s, w, lam, V: tl.constexpr):
    new, keep, take, o, at_u, at_z, at_f, at_o, q_h, l_h = _slstm_slopes(x, s, w)
    lam_q = tl.fma(lam[0], o, lam[1])
    lam_u = tl.fma(lam_q, at_u, lam[2] * keep)
    old = (tl.fma(lam_q, q_h, tl.fma(lam[2], l_h, lam[0] * (at_o * w[3]))), lam_q * keep, lam_u)
    di, df, dz, do = lam[2] * take - lam_q * at_u, lam_u * at_f, lam_q * at_z, lam[0] * at_o
    return old, (di, df, dz, do), (di * s[0], df * s[0], dz * s[0], do * s[0])


class Device(NamedTuple):
    """A cell's three functions."""

    step: Any
    jacobian: Any
    vjp: Any


DEVICE = {
    cells.RNN: Device(rnn_step, rnn_jacobian, rnn_vjp),
    cells.GRU: Device(gru_step, gru_jacobian, gru_vjp),
    cells.LSTM: Device(lstm_step, lstm_jacobian, lstm_vjp),
    cells.SLSTM: Device(slstm_step, slstm_jacobian, slstm_vjp),
}  # by the very class: a subclass may have another step


def variant(cell: cells.Cell) -> int:
    match cell:
        case cells.RNN():
            return int(cell.activation == "relu")
        case cells.LSTM():
            return cell.coupled + 2 * cell.peephole
    return 0


def constants(cell: cells.Cell) -> dict[str, int]:
    """Numbers of states, inputs and weights, and the variant: what kernels are compiled for."""
    inputs, states = len(cell.inputs), len(cell.states)
    return {"S": states, "G": inputs, "W": inputs + len(cell.weights), "V": variant(cell)}
