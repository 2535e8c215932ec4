"""Attention: chunked = reference = torch's own, whatever stands before, however rows are packed."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from plait.ops.attention import KERNELS, attention, engines, flash, fused, halves, packed
from plait.ops.attention.reference import weigh
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
    """By every form that fits."""
    results = []
    fused = call.get("softcap") is None
    more = "sinks" in tensors or (call.get("prefix") and call.get("window"))
    rows = more and tensors["q"].shape[1] > 1 and not {"q_start", "k_start"} & call.keys()
    for name in ("reference", "chunked", *(["varlen"] if fused and ("packing" in call or rows) else [])):
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


SINKS = torch.tensor([0.3, -2.0, 5.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "call", [{}, {"window": 7}, {"window": 7, "prefix": 3}, {"softcap": 1.5}, {"packing": packing()}], ids=str
)
def test_a_sink_takes_its_part(call, close):
    """In every form, with gradients: e^sink beside the sum of weights, which a key of zeros and a value of zeros has too."""
    tensors = inputs(sum(DOCUMENTS), batch=1)
    got = both(tensors | {"sinks": SINKS}, close, **call)
    close(
        both(tensors | {"sinks": torch.full((HEADS,), -torch.inf, dtype=torch.float64)}, close, **call),
        attention(**tensors, **call),
    )
    alone = attention(
        **{name: x[:, :1] for name, x in tensors.items()}, **{k: v for k, v in call.items() if k != "packing"}
    )
    logits = (tensors["q"][0, 0] * tensors["k"][0, 0].repeat_interleave(2, 0)).sum(-1) * K**-0.5
    logits = logits if "softcap" not in call else 1.5 * torch.tanh(logits / 1.5)
    close(got[0, 0], alone[0, 0] * torch.sigmoid(logits - SINKS)[:, None])


@pytest.mark.parametrize("sink", [-1e4, 1e4])
def test_extreme_sinks(sink, close):
    """One that takes all leaves nothing, without a NaN; one that takes nothing is none."""
    tensors = inputs(65) | {"sinks": torch.full((HEADS,), sink, dtype=torch.float64)}
    got = both(tensors, close)
    want = attention(**inputs(65)) if sink < 0 else torch.zeros_like(got)
    close(got, want)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [1, 7, 64, 1000])
@pytest.mark.parametrize("prefix", [1, 5, 100])
@pytest.mark.parametrize("length", [1, 2, 65, 300])
def test_a_prefix_beside_a_window(length, prefix, window, softcap, close):
    tensors = inputs(length)
    got = both(tensors, close, window=window, prefix=prefix, softcap=softcap)
    at = torch.arange(length)
    gap = at[:, None] - at
    mask = (gap >= 0) & ((gap < window) | (at < prefix))
    close(got, weigh(*tensors.values(), None, mask[None, None], softcap, K**-0.5))


@pytest.mark.parametrize(("start", "length"), [(0, 9), (2, 1), (2, 9), (4, 30), (20, 1), (20, 30), (300, 300)])
def test_a_prefix_that_a_state_keeps(start, length, close):
    """The first keys apart, and a tail that may hold them a second time."""
    window, prefix, total = 8, 5, start + length
    whole = inputs(total)
    want = both(whole, close, window=window, prefix=prefix)[:, start:]
    tensors = {"q": whole["q"][:, start:]}
    for name in ("k", "v"):
        x = F.pad(whole[name], (0, 0, 0, 0, 0, max(0, prefix - total)), value=9.0)  # not seen yet
        tail = F.pad(whole[name], (0, 0, 0, 0, window - 1, 0), value=9.0)[:, start:]
        tensors[name] = torch.cat([x[:, :prefix], tail], 1)
    for at in (start, torch.tensor([start, start])):
        close(both(tensors, close, q_start=at, k_start=at - (window - 1), window=window, prefix=prefix), want)


@pytest.mark.parametrize("sizes", [(6, 4), (4, 6)])
@pytest.mark.parametrize("call", [{}, {"window": 7}, {"packing": packing()}], ids=str)
def test_keys_and_values_of_different_size(sizes, call, close):
    tensors = inputs(sum(DOCUMENTS), batch=1)
    tensors = {name: x[..., : sizes[name == "v"]] for name, x in tensors.items()}
    assert both(tensors, close, **call).shape[3] == sizes[1]


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


@pytest.mark.parametrize("keys", [1, 2, 4])
@pytest.mark.parametrize("length", [128, 200, 512])
def test_rows_in_halves(length, keys, close):
    """Keys of any number of heads, that are parts of one projection; with gradients."""
    joined = {"qkv": torch.cat(list(inputs(length, keys=keys).values()), 2)}
    assert halves.pieces(joined["qkv"]) == {128: 2, 200: 2, 512: 8}[length]

    def ours(qkv):
        return attention(*qkv.split_with_sizes((HEADS, keys, keys), 2)), None

    def theirs(qkv):
        parts = (x.transpose(1, 2) for x in qkv.split_with_sizes((HEADS, keys, keys), 2))
        return F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True).transpose(1, 2), None

    want = run_with_gradients(theirs, joined)
    for name, x in run_with_gradients(ours, joined).items():
        close(x, want[name])


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


@pytest.mark.parametrize(
    "call",
    [{}, {"window": 3}, {"window": 3, "prefix": 4}, {"window": 1, "prefix": 1}, {"window": 7, "prefix": 100}],
    ids=str,
)
def test_packed(call, close):
    tensors = inputs(sum(DOCUMENTS), batch=1)
    got = both(tensors, close, **call, packing=packing())
    for start, end in packing().bounds:
        close(got[:, start:end], attention(*(x[:, start:end] for x in tensors.values()), **call))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "v"), [(64, 64), (20, 20), (24, 40)])  # both of torch's kernels, aligned and not
@pytest.mark.parametrize(("window", "prefix"), [(None, 0), (7, 0), (7, 3)])
def test_packed_on_a_gpu(window, prefix, k, v, dtype):
    row = packing(device="cuda")
    shapes = {"q": (HEADS, k), "k": (2, k), "v": (2, v)}
    tensors = {
        name: torch.randn(1, sum(DOCUMENTS), *shape, device="cuda", dtype=dtype) for name, shape in shapes.items()
    }

    def run(**x):
        return attention(**x, window=window, prefix=prefix, packing=row), None

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
        (501, False, None, False),  # a prompt
        (501, True, (300, 201), False),
        (501, True, None, True),
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
    _, (name, reason), _ = explain(KERNELS, Call("cpu", torch.float32, "one"))
    assert name == "chunked (torch's flash attention kernel)" and reason == "used"
    assert explain(KERNELS, Call("nowhere", torch.float32, "one"))[1] == ("chunked", "used")


def test_gradients_begin_where_a_gpu_reads():
    """Of heads that a merge has joined with another mixer's, the gradient is a part of a larger one, at any offset."""
    whole = torch.arange(3.0 * 78).view(3, 78)
    for part in (whole[:, 30:], whole[:1, 30:], whole[:, 28:76], whole[:, 2:]):
        lined = fused.lined(part)
        assert torch.equal(lined, part)
        assert lined.storage_offset() * 4 % 16 == 0 and (
            len(part) == 1 or lined.stride(0) * 4 % 16 == 0 or lined.is_contiguous()
        )
    wide = torch.zeros(3, 96)
    assert fused.lined(wide[:, 32:]).data_ptr() == wide[:, 32:].data_ptr()  # as it lies


def lined_up_at_the_end(
    q, k, v, cuts, more_cuts, t, s, dropout, causal, mask, *, scale, window_size_left, window_size_right
):
    """What torch's kernel is documented to do, written out: -1 is no bound."""
    assert cuts is more_cuts is None
    assert (dropout, mask, window_size_right) == (0.0, False, -1 if causal else 0)
    gap = torch.arange(t)[:, None] + s - t - torch.arange(s)
    seen = (gap >= 0) & ((gap <= window_size_left) if window_size_left >= 0 else True)
    q, k, v = (x.repeat_interleave(HEADS // x.shape[2], 2).transpose(1, 2) for x in (q, k, v))
    logits = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2), None


@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize(("before", "start"), [(0, 0), (5, 5), (40, 40), (9, 4), (9, 20)])
def test_new_tokens_in_the_flash_kernel(before, start, window, close, monkeypatch):
    """`before` keys stand before the first new token, which is at `start`; of more than that nobody sees the first."""
    t = 33
    tensors = inputs(t, before + t)
    call = {"q_start": start, "k_start": start - before, "window": window}
    with forced("reference"):
        want = attention(**tensors, **call)
    monkeypatch.setattr(flash, "fits", lambda *given: True)
    monkeypatch.setattr(flash, "aten", SimpleNamespace(_flash_attention_forward=lined_up_at_the_end))
    with forced("chunked"):
        close(attention(**tensors, **call), want)


class Written:
    """What torch's kernels for packed documents are documented to do, written out, document by document."""

    @staticmethod
    def seen(t, s, causal, window, from_the_end):
        gap = torch.arange(t)[:, None] - torch.arange(s) + (s - t if from_the_end else 0)
        return (gap >= 0 if causal else gap == gap) & (gap < window if window else True)

    def forward(self, q, k, v, cuts, more_cuts, scale, causal, window, from_the_end):
        o, lse = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[1], q.shape[0])
        for (a, b), (c, d) in zip(pairs(cuts), pairs(more_cuts), strict=True):
            keys, values = (x[c:d].repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
            logits = torch.einsum("thk,shk->hts", q[a:b], keys) * scale
            logits = logits.masked_fill(~self.seen(b - a, d - c, causal, window, from_the_end), -torch.inf)
            o[a:b] = torch.einsum("hts,shv->thv", logits.softmax(2), values)
            lse[:, a:b] = logits.logsumexp(2)
        return o, lse

    def backward(self, do, q, k, v, o, lse, cuts, more_cuts, scale, causal, window, from_the_end):
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (a, b), (c, d) in zip(pairs(cuts), pairs(more_cuts), strict=True):
            keys, values = (x[c:d].repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
            weights = (torch.einsum("thk,shk->hts", q[a:b], keys) * scale - lse[:, a:b, None]).exp()
            weights = weights * self.seen(b - a, d - c, causal, window, from_the_end)
            taken = (do[a:b] * o[a:b]).sum(2).T[..., None]
            slopes = weights * (torch.einsum("thv,shv->hts", do[a:b], values) - taken) * scale
            dq[a:b] = torch.einsum("hts,shk->thk", slopes, keys)
            dk[c:d] = torch.einsum("hts,thk->shk", slopes, q[a:b]).unflatten(1, (k.shape[1], -1)).sum(2)
            dv[c:d] = torch.einsum("hts,thv->shv", weights, do[a:b]).unflatten(1, (v.shape[1], -1)).sum(2)
        return dq, dk, dv

    def _flash_attention_forward(
        self, q, k, v, cuts, more_cuts, t, s, dropout, causal, mask, *, scale, window_size_left, window_size_right
    ):
        assert (dropout, mask) == (0.0, False) and t == longest(cuts) and s == longest(more_cuts)
        window, near = window_size_left + 1, window_size_right == 0
        return *self.forward(q, k, v, cuts, more_cuts, scale, causal or near, window, True), None

    def _flash_attention_backward(
        self,
        do,
        q,
        k,
        v,
        o,
        lse,
        cuts,
        more_cuts,
        t,
        s,
        dropout,
        causal,
        *random,
        scale,
        window_size_left,
        window_size_right,
    ):
        assert t == longest(cuts) and s == longest(more_cuts)
        window, near = window_size_left + 1, window_size_right == 0
        return self.backward(do, q, k, v, o, lse, cuts, more_cuts, scale, causal or near, window, True)

    def _efficient_attention_forward(
        self, q, k, v, bias, cuts, more_cuts, t, s, dropout, kind, wanted, *, scale, window_size
    ):
        assert bias is None and wanted and t == longest(cuts) and s == longest(more_cuts)
        assert kind == 1 or window_size is None
        o, lse = self.forward(q[0], k[0], v[0], cuts, more_cuts, scale, kind == 1, window_size, False)
        by_document = lse.new_full((len(cuts) - 1, HEADS, t + -t % 32), torch.inf)
        for document, (a, b) in enumerate(pairs(cuts)):
            by_document[document, :, : b - a] = lse[:, a:b]
        return o[None], by_document, None

    def _efficient_attention_backward(
        self,
        do,
        q,
        k,
        v,
        bias,
        o,
        cuts,
        more_cuts,
        t,
        s,
        lse,
        dropout,
        seed,
        offset,
        kind,
        wanted,
        *,
        scale,
        window_size,
    ):
        assert t == longest(cuts) and s == longest(more_cuts) and lse.shape == (len(cuts) - 1, HEADS, t + -t % 32)
        flat = torch.cat([lse[document, :, : b - a] for document, (a, b) in enumerate(pairs(cuts))], 1)
        found = self.backward(
            do[0], q[0], k[0], v[0], o[0], flat, cuts, more_cuts, scale, kind == 1, window_size, False
        )
        return *(x[None] for x in found), None


def pairs(cuts):
    return list(zip(cuts.tolist(), cuts.tolist()[1:], strict=False))


def longest(cuts):
    return max(b - a for a, b in pairs(cuts))


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize(("window", "prefix"), [(None, 0), (7, 0), (7, 3), (1, 1), (5, 100)])
@pytest.mark.parametrize("sinks", [False, True])
def test_what_a_gpus_kernels_are_asked_for(kernel, window, prefix, sinks, close, monkeypatch):
    tensors = inputs(sum(DOCUMENTS), batch=1) | ({"sinks": SINKS} if sinks else {})

    def run(**x):
        return attention(**x, window=window, prefix=prefix, packing=packing()), None

    with forced("reference"):
        want = run_with_gradients(run, tensors)
    monkeypatch.setattr(engines, "aten", Written())
    kernels = getattr(engines, kernel), getattr(engines, f"{kernel}_back")
    monkeypatch.setattr(packed, "engine", lambda q, v: kernels)
    with forced("varlen"):
        got = run_with_gradients(run, tensors)
    for name, x in want.items():
        close(got[name], x)
