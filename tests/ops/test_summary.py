"""Summaries of runs of tokens: combined they are the summary of the whole, and applied they are the op."""

import pytest
import torch
import torch.nn.functional as F

from plait.ops import conv, delta, gla, mlstm, scan, selective, ssd
from plait.ops.conv import causal_conv
from plait.ops.delta import gated_delta
from plait.ops.gla import dplr
from plait.ops.gla import gla as gla_op
from plait.ops.mlstm import mlstm as mlstm_op
from plait.ops.scan import scan as scan_op
from plait.ops.selective import selective_scan
from plait.ops.ssd import ssd as ssd_op
from tests.ops.conftest import run_with_gradients

T, G, H, K, V, D = 150, 2, 4, 6, 5, 3


def linear(decay):
    torch.manual_seed(0)
    k = F.normalize(torch.randn(2, T, G, K, dtype=torch.float64), dim=-1)
    v, beta = torch.randn(2, T, H, V, dtype=torch.float64), torch.rand(2, T, H, dtype=torch.float64)
    return k, v, -decay * torch.rand(2, T, H, dtype=torch.float64), beta, torch.randn(2, H, V, K, dtype=torch.float64)


def problem(name, decay=0.1):
    """The tokens, their summary, the state before them, and the state after them by the op."""
    k, v, g, beta, state = linear(decay)
    if name == "ssd":
        return (k, v, g), ssd.summary, state, lambda k, v, g, state: ssd_op(k, k, v, g, state=state)[1]
    if name == "delta":
        tokens = k, v, g, beta
        return tokens, delta.summary, state, lambda k, v, g, beta, state: gated_delta(k, k, v, g, beta, state=state)[1]
    if name == "mlstm":  # gates before their exponential and sigmoid, as far from 0 as `decay` says
        k, v, i, f = torch.randn(2, T, H, K).double(), v, 100 * decay * g, -60 * decay * g
        state = torch.randn(2, H, V + 2, K, dtype=torch.float64)
        state[:, :, -1] = state[:, :, -1, :1]  # m
        return (k, v, i, f), mlstm.summary, state, lambda k, v, i, f, state: mlstm_op(k, k, v, i, f, state=state)[1]
    if name == "scan":
        a, b = torch.rand(2, T, D, V, dtype=torch.float64) ** decay, torch.randn(2, T, D, V, dtype=torch.float64)
        return (a, b), scan.summary, torch.randn(2, D, V).double(), lambda a, b, state: scan_op(a, b, state=state)[1]
    if name == "selective":
        x, dt = torch.randn(2, T, D, dtype=torch.float64), decay * torch.rand(2, T, D, dtype=torch.float64)
        B, A = torch.randn(2, T, K, dtype=torch.float64), -torch.rand(D, K, dtype=torch.float64)
        tokens, before = (x, dt, B), torch.randn(2, D, K, dtype=torch.float64)
        return (
            tokens,
            lambda x, dt, B: selective.summary(x, dt, A.to(torch.promote_types(x.dtype, torch.float32)), B),
            before,
            lambda x, dt, B, state: selective_scan(x, dt, A, B, B, state=state)[1],
        )
    if name in ("kda", "gla", "dplr"):
        g = g[..., None] * torch.rand(2, T, H, K, dtype=torch.float64)
        if name == "kda":
            return (k, v, g, beta), delta.summary, state, lambda *x: gated_delta(x[0], *x[:-1], state=x[-1])[1]
        k = k.repeat_interleave(H // G, 2)
        if name == "gla":
            return (k, v, g), gla.summary, state, lambda k, v, g, state: gla_op(k, k, v, g, state=state)[1]
        p, z = -k.flip(2), beta[..., None] * k.flip(2)
        return (k, v, g, p, z), gla.summary, state, lambda *x: dplr(x[0], *x[:-1], state=x[-1])[1]
    x, weight = torch.randn(2, T, D, dtype=torch.float64), torch.randn(D, 4, dtype=torch.float64)
    state = torch.randn(2, 3, D, dtype=torch.float64)
    return (x,), lambda x: conv.summary(x, 4), state, lambda x, state: causal_conv(x, weight, state=state)[1]


NAMES = ("ssd", "delta", "mlstm", "scan", "selective", "kda", "gla", "dplr", "conv")


@pytest.mark.parametrize("decay", [0.1, 50.0])
@pytest.mark.parametrize("name", NAMES)
def test_applied_it_is_the_op(name, decay, close):
    tokens, summary, state, op = problem(name, decay)
    for count in (1, 2, 64, T):
        some = [x[:, :count] for x in tokens]
        close(summary(*some).apply(state), op(*some, state))


@pytest.mark.parametrize("name", NAMES)
def test_combined_it_is_the_summary_of_both(name, close):
    tokens, summary, state, _ = problem(name)
    whole = summary(*tokens)
    for cuts in ((1,), (70,), (149,), (2, 3), (40, 90)):
        parts = [summary(*part) for part in zip(*(x.tensor_split(cuts, 1) for x in tokens), strict=True)]
        left = parts[0]
        for part in parts[1:]:
            left = left.combine(part)
        right = parts[-1]
        for part in parts[-2::-1]:
            right = part.combine(right)
        for combined in (left, right):
            close(combined.apply(state), whole.apply(state))
            for ours, theirs in zip(vars_of(combined), vars_of(whole), strict=True):
                close(ours, theirs)


def vars_of(summary):
    return [x for x in vars(summary).values() if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_go_through(name, close):
    """A rank's loss reaches the tokens of the ranks before it."""
    tokens, summary, state, op = problem(name)
    names = [str(i) for i in range(len(tokens))]

    def by_parts(state, **x):
        first, then = zip(*(x[name].tensor_split((60,), 1) for name in names), strict=True)
        return summary(*first).combine(summary(*then)).apply(state), None

    def whole(state, **x):
        return op(*(x[name] for name in names), state), None

    tensors = dict(zip(names, tokens, strict=True)) | {"state": state}
    got, want = run_with_gradients(by_parts, tensors), run_with_gradients(whole, tensors)
    for key, x in want.items():
        close(got[key], x)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_narrow_tokens_are_summed_up_in_float32(name):
    tokens, summary, state, _ = problem(name)
    narrow = [x.bfloat16() for x in tokens]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = summary(*narrow).combine(summary(*narrow)).apply(state.float())
    want = summary(*(x.float() for x in narrow))
    assert torch.equal(got, want.combine(want).apply(state.float()))
