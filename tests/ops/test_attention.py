"""Attention: chunked = reference = torch's own, whatever stands before, however rows are packed."""

import pytest
import torch
import torch.nn.functional as F

from plait.ops.attention import KERNELS, attention, fused
from plait.ops.kernels import Call, explain, forced
from tests.ops.conftest import DOCUMENTS, packing, run_with_gradients

HEADS, K, V = 4, 6, 6


def inputs(t, s=None, keys=2, batch=2):
    torch.manual_seed(t)
    return {
        "q": torch.randn(batch, t, HEADS, K, dtype=torch.float64),
        "k": torch.randn(batch, s or t, keys, K, dtype=torch.float64),
        "v": torch.randn(batch, s or t, keys, V, dtype=torch.float64),
    }


def both(tensors, close, **call):
    results = []
    for name in ("reference", "chunked", *(["varlen"] if "packing" in call else [])):
        with forced(name):
            results.append(run_with_gradients(lambda **x: (attention(**x, **call), None), tensors))
    for name, x in results[0].items():
        for result in results[1:]:
            close(result[name], x)
    return results[0]["0"]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 7, 64, 1000])
@pytest.mark.parametrize("length", [1, 2, 65, 300])
def test_chunked_is_reference(length, window, softcap, close):
    both(inputs(length), close, window=window, softcap=softcap)


@pytest.mark.parametrize("call", [{}, {"window": 7}, {"softcap": 1.5}, {"packing": packing()}], ids=str)
def test_scale_is_that_of_queries(call, close):
    """In every form, with gradients."""
    tensors = inputs(sum(DOCUMENTS), batch=1)
    got = both(tensors, close, scale=0.3, **call)
    close(got, attention(**tensors | {"q": tensors["q"] * 0.3 * K**0.5}, **call))


@pytest.mark.parametrize("keys", [1, 2, 4])
def test_reference_is_torch(keys, close):
    tensors = inputs(70, keys=keys)
    with forced("reference"):
        got = attention(**tensors)
    q, k, v = (x.transpose(1, 2) for x in tensors.values())
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    close(got, want.transpose(1, 2))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("start", "length"), [(0, 9), (20, 1), (20, 30), (300, 300)])
def test_after_a_past(start, length, window, close):
    """The last rows of a whole are what the same queries see when the keys before them come from a state."""
    total = start + length
    whole = inputs(total)
    want = both(whole, close, window=window)[:, start:]
    room = {
        name: F.pad(x, (0, 0, 0, 0, 0, 3), value=9.0) for name, x in whole.items() if name != "q"
    }  # unused capacity
    tensors = {"q": whole["q"][:, start:], **room}
    close(both(tensors, close, q_start=start, window=window), want)
    rows = torch.tensor([start, start])
    close(both(tensors, close, q_start=rows, window=window), want)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_window_from_its_tail(softcap, close):
    """Keys that begin before position 0 are not there yet."""
    window, length = 8, 30
    whole = inputs(length)
    want = both(whole, close, window=window, softcap=softcap)
    tail = {name: F.pad(x, (0, 0, 0, 0, window - 1, 0)) for name, x in whole.items() if name != "q"}
    for start in (0, torch.tensor([0, 0])):
        got = both({"q": whole["q"], **tail}, close, q_start=start, k_start=start - 7, window=window, softcap=softcap)
        close(got, want)


def test_rows_at_different_positions(close):
    whole = inputs(20)
    want = attention(**whole)
    starts = torch.tensor([4, 11])
    queries = torch.stack([whole["q"][row, start : start + 5] for row, start in enumerate(starts.tolist())])
    got = both({"q": queries, "k": whole["k"], "v": whole["v"]}, close, q_start=starts)
    for row, start in enumerate(starts.tolist()):
        close(got[row], want[row, start : start + 5])


@pytest.mark.parametrize("window", [None, 3])
def test_packed(window, close):
    tensors = inputs(sum(DOCUMENTS), batch=1)
    got = both(tensors, close, window=window, packing=packing())
    for start, end in packing().bounds:
        close(got[:, start:end], attention(*(x[:, start:end] for x in tensors.values()), window=window))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "v"), [(64, 64), (20, 20), (24, 40)])  # both of torch's kernels, aligned and not
@pytest.mark.parametrize("window", [None, 7])
def test_packed_on_a_gpu(window, k, v, dtype):
    row = packing(device="cuda")
    shapes = {"q": (HEADS, k), "k": (2, k), "v": (2, v)}
    tensors = {
        name: torch.randn(1, sum(DOCUMENTS), *shape, device="cuda", dtype=dtype) for name, shape in shapes.items()
    }

    def run(**x):
        return attention(**x, window=window, packing=row), None

    with forced("reference"):
        want = run_with_gradients(run, {name: x.double() for name, x in tensors.items()})
    for name, x in run_with_gradients(run, tensors).items():
        bound = (
            2e-5 if dtype == torch.float32 else 2e-2
        )  # some roundings of the largest value; 9e-7 and 7e-3 on an H100
        assert (x.double() - want[name]).abs().max() <= bound * want[name].abs().max()


def test_softcap_bounds_logits(close):
    """With logits of plus and minus a thousand, a cap of 1 leaves weights within e^2 of each other."""
    q = torch.full((1, 2, 1, 2), 100.0, dtype=torch.float64)
    k = torch.stack([q[0, 0], -q[0, 0]])[None]
    v = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    y = both({"q": q, "k": k, "v": v}, close, softcap=1.0)
    assert y[0, 1, 0, 0] == pytest.approx(1 / (1 + torch.e**-2))


@pytest.mark.parametrize(
    ("length", "train", "lengths", "planned"),
    [
        (1, False, None, False),
        (1, True, None, False),  # a token at a time in training, too
        (7, True, None, False),
        (500, False, None, False),  # a prompt
        (500, True, (300, 200), False),
        (500, True, None, True),
    ],
)
def test_a_kernel_that_plans_is_kept_to_shapes_that_come_again(length, train, lengths, planned, monkeypatch):
    """As if this machine had cuDNN; the switch itself is torch's and there on every machine."""
    seen = []

    def record(q, k, v, **rest):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return torch.empty_like(q)

    monkeypatch.setattr(fused, "DEVICES", ("cpu",))
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    q = torch.zeros(1, length, HEADS, K, requires_grad=train)
    with forced(None if lengths is None else "chunked"):  # documents one by one
        attention(q, q, q, packing=None if lengths is None else packing(lengths))
    assert seen == [planned] * len(seen) and seen
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_kernel_that_the_user_switched_off_stays_off(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: pytest.fail("it was switched"))
    assert fused.for_any_length(lambda x: x, 3) == 3


def test_the_switch_is_part_of_a_compiled_graph():
    def step(x):
        return fused.for_any_length(F.scaled_dot_product_attention, x, x, x)

    graphs = []
    torch.compile(step, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)(torch.zeros(1, 2, 1, 4))
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    switches = [place for place, target in enumerate(called) if target is torch.nn.attention._sdpa_kernel]
    assert switches[0] < called.index(F.scaled_dot_product_attention) < switches[1]


def test_explain_names_the_kernel_within():
    (name, reason), _ = explain(KERNELS, Call("cpu", torch.float32, "one"))
    assert name == "chunked (torch's flash attention kernel)" and reason == "used"
    assert explain(KERNELS, Call("nowhere", torch.float32, "one"))[0] == ("chunked", "used")
