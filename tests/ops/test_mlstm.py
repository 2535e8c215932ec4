"""mLSTM: every form is the definition, under any gates; and the definition is the paper's, without a stabiliser."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from plait.ops.kernels import forced
from plait.ops.mlstm import KERNELS, mlstm
from plait.ops.mlstm.gates import EPS, stabilised
from tests.ops.conftest import DOCUMENTS, LENGTHS, forms, packing, run_with_gradients

HEADS, K, V = 3, 6, 5


def inputs(length, batch=2, rows=None, state=True, gates=3.0, dtype=torch.float64):
    torch.manual_seed(length)
    shapes = {"q": (K,), "k": (K,), "v": (V,), "i": (), "f": ()}
    tensors = {name: torch.randn(batch, length, HEADS, *shape, dtype=dtype) for name, shape in shapes.items()}
    tensors["i"], tensors["f"] = gates * tensors["i"], gates * tensors["f"]
    if state:
        tensors["state"] = torch.randn(rows or batch, HEADS, V + 2, K, dtype=dtype)
    return tensors


def both(tensors, close, **call):
    """Every form that fits the call against the reference; gives the reference's answers."""
    *fast, reference = forms(KERNELS, tensors["v"].shape[1])
    with forced(reference):
        want = run_with_gradients(lambda **x: mlstm(**x, **call), tensors)
    for name in fast:
        with forced(f"mlstm={name}"):
            got = run_with_gradients(lambda **x: mlstm(**x, **call), tensors)
        for key, x in want.items():
            close(got[key], x)
    return want


@pytest.mark.parametrize("gates", [3.0, 200.0])
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_form_is_the_definition(length, state, gates, close):
    """Also with gates of hundreds, whose sums reach 5e4 and lose as many digits."""
    close.tolerance = 1e-10 if gates == 3.0 else 1e-9
    both(inputs(length, state=state, gates=gates), close)


@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("gates", [3.0, 200.0])
def test_packed(gates, state, close):
    close.tolerance = 1e-10 if gates == 3.0 else 1e-9
    tensors = inputs(sum(DOCUMENTS), batch=1, rows=len(DOCUMENTS), state=state, gates=gates)
    both(tensors, close, packing=packing())


@pytest.mark.parametrize(("i", "f"), [(200.0, 200.0), (-200.0, 200.0), (200.0, -200.0), (-200.0, -200.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_long_runs_of_gates_that_are_all_open_or_shut(i, f, dtype, close):
    """A thousand tokens of them, then some that are not; keys and queries above 0, so that n q does not cancel."""
    close.tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    tensors = inputs(1100, batch=1, gates=1.0, dtype=dtype)
    tensors |= {name: tensors[name].abs() for name in ("q", "k", "state")}
    tensors["i"][:, 40:1040], tensors["f"][:, 40:1040] = i, f
    with forced("reference"), torch.no_grad():
        want = mlstm(**tensors)
    got = mlstm(**{name: x.requires_grad_() for name, x in tensors.items()})
    for ours, theirs in zip(got, want, strict=True):
        close(ours.detach(), theirs)
    sum(x.sum() for x in got).backward()
    assert all(x.grad.isfinite().all() for x in tensors.values())


def test_it_is_the_paper_s_recurrence(close):
    """Equations 19 to 27 as they stand, which small gates allow."""
    x = inputs(30, state=False, gates=1.0)
    C, n = torch.zeros(2, HEADS, V, K).double(), torch.zeros(2, HEADS, K).double()
    outputs = []
    for t in range(30):
        q, k, v, i, f = (x[name][:, t] for name in ("q", "k", "v", "i", "f"))
        i, f = i.exp()[..., None], f.sigmoid()[..., None]
        C = f[..., None] * C + (i * v)[..., None] * k[..., None, :]
        n = f * n + i * k
        outputs.append((C @ q[..., None])[..., 0] / (n * q).sum(-1, keepdim=True).abs().clamp(min=1))
    close.tolerance = 100 * EPS  # which the stabilised form adds to what is divided by, relative to exp(-m)
    close(mlstm(**x)[0], torch.stack(outputs, 1))


def test_the_stabiliser_is_a_running_maximum(close):
    x = inputs(70, state=False, gates=20.0)
    m = torch.zeros(2, HEADS).double()
    gates = stabilised(x["i"], x["f"], None, None)
    for t in range(70):
        before = torch.nn.functional.logsigmoid(x["f"][:, t]) + m
        m = torch.maximum(before, x["i"][:, t])
        close(gates.m[:, t], m)
        close(gates.g[:, t].exp(), (before - m).exp())
    assert (gates.g <= 1e-9).all() and (gates.scale <= 1 + 1e-9).all()


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_a_graph_holds_no_sum_over_time(documents):
    """Of gates with a bias per head torch 2.11's compiler wrote no code for a GPU."""

    def gates(x, bias):
        found = stabilised(x, x + bias, None, None if documents is None else packing(documents))
        return torch.autograd.grad(sum(y.sum() for y in found), (x, bias))

    tokens = sum(DOCUMENTS)
    graph = make_fx(gates)(torch.randn(1, tokens, HEADS, requires_grad=True), torch.randn(HEADS, requires_grad=True))
    names = [node.name for node in graph.graph.nodes]
    assert {"mlstm_gates", "mlstm_gates_backward"} <= set(names)
    assert not [name for name in names if name.startswith(("cumsum", "cummax"))]


@pytest.mark.parametrize("tokens", [1, 70])
def test_narrow_inputs_are_computed_in_float32(tokens, close):
    narrow = {name: x.bfloat16() for name, x in inputs(tokens, state=False, dtype=torch.float32).items()}
    want, _ = mlstm(**{name: x.float() for name, x in narrow.items()})
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = mlstm(**narrow)
    assert got.dtype == torch.bfloat16
    close.tolerance = 2**-8  # one rounding
    close(got.float(), want)
