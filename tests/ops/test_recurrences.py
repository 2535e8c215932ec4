"""The delta rules and the recurrences with a decay per head or key channel: chunked = reference = transformers."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

import plait.ops.delta
import plait.ops.gla
import plait.ops.packing as packings
import plait.ops.ssd
from plait.ops.delta import chunked as delta_chunked
from plait.ops.delta import gated_delta
from plait.ops.gla import chunked as gla_chunked
from plait.ops.gla import dplr, gla
from plait.ops.kernels import forced
from plait.ops.ssd import chunked as ssd_chunked
from plait.ops.ssd import ssd
from tests.ops.conftest import DOCUMENTS, LENGTHS, forms, packing, run_with_gradients

GROUPS, HEADS, K, V = 2, 4, 6, 5


def kda(*inputs, **call):
    """The delta rule with a decay per key channel."""
    return gated_delta(*inputs, **call)


OPS = {
    "delta": (gated_delta, delta_chunked),
    "ssd": (ssd, ssd_chunked),
    "kda": (kda, gla_chunked),
    "gla": (gla, gla_chunked),
    "dplr": (dplr, gla_chunked),
}
PER_CHANNEL = plait.ops.gla.KERNELS
KERNELS = {gated_delta: plait.ops.delta.KERNELS, ssd: plait.ops.ssd.KERNELS} | dict.fromkeys(
    (kda, gla, dplr), PER_CHANNEL
)


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param][0]


def inputs(op, length, batch=2, rows=None, state=True, decay=0.3, dtype=torch.float64):
    """Random q, k, v, g (and what is removed, and a state with `rows` rows) of one call."""
    torch.manual_seed(length)
    groups = HEADS if op in (gla, dplr) else GROUPS
    channels = () if op in (gated_delta, ssd) else (K,)
    tensors = {
        "q": torch.randn(batch, length, groups, K, dtype=dtype),
        "k": F.normalize(torch.randn(batch, length, groups, K, dtype=dtype), dim=-1),
        "v": torch.randn(batch, length, HEADS, V, dtype=dtype),
        "g": -decay * torch.rand(batch, length, HEADS, *channels, dtype=dtype),
    }
    if op is dplr:
        tensors["z"] = F.normalize(torch.randn(batch, length, HEADS, K, dtype=dtype), dim=-1)
        tensors["p"] = -tensors["z"] * torch.rand(batch, length, HEADS, K, dtype=dtype)
    if op in (gated_delta, kda):
        tensors["beta"] = torch.rand(batch, length, HEADS, dtype=dtype)
    if state:
        tensors["state"] = torch.randn(rows or batch, HEADS, V, K, dtype=dtype)
    return tensors


def both(op, tensors, close, **call):
    """Every form that fits the call against the reference; gives the reference's answers."""
    *fast, reference = forms(KERNELS[op], tensors["v"].shape[1])
    with forced(reference):
        want = run_with_gradients(lambda **x: op(**x, **call), tensors)
    for name in fast:
        with forced(name):
            got = run_with_gradients(lambda **x: op(**x, **call), tensors)
        for key, x in want.items():
            close(got[key], x)
    return want


@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_is_reference(op, length, state, close):
    both(op, inputs(op, length, state=state), close)


def test_a_state_in_another_layout(op, close):
    for length in (1, 70):
        tensors = inputs(op, length)
        tensors["state"] = tensors["state"].mT.contiguous().mT
        both(op, tensors, close)


@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_packed(op, state, close):
    tensors = inputs(op, sum(DOCUMENTS), batch=1, rows=len(DOCUMENTS), state=state)
    packed = both(op, tensors, close, packing=packing())
    y, start = [], 0
    for row, length in enumerate(DOCUMENTS):
        document = {name: x[:, start : start + length] for name, x in tensors.items() if name != "state"}
        if state:
            document["state"] = tensors["state"][row : row + 1]
        alone, final = op(**document)
        y.append(alone)
        if state:
            close(packed["1"][row : row + 1], final)
        start += length
    close(packed["0"], torch.cat(y, 1))


@pytest.mark.parametrize("size", [1, 7, 16, 128, 300])
@pytest.mark.parametrize("name", OPS)
def test_chunk_size_changes_nothing(name, size, close):
    op, module = OPS[name]
    for length, documents in ((257, None), (sum(DOCUMENTS), DOCUMENTS)):
        tensors = inputs(op, length, batch=1, rows=1 if documents is None else len(documents))

        want = _chunked(op, tensors, documents)
        with chunks_of(size, module):
            got = _chunked(op, tensors, documents)
        for key, x in want.items():
            close(got[key], x)


def _chunked(op, tensors, documents):
    call = {} if documents is None else {"packing": packing(documents)}
    with forced("chunked"):
        return run_with_gradients(lambda **x: op(**x, **call), tensors)


@contextmanager
def chunks_of(size, *modules):
    """Chunks of so many tokens, in packings too; those that are known are forgotten, before and after."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (packings, *modules):
            patch.setattr(module, "CHUNK", size)
        packings._known.cache_clear()
        yield
    packings._known.cache_clear()


def test_no_state_in_no_state_out(op):
    for length in (1, 70):
        assert op(**inputs(op, length, state=False))[1] is None


@pytest.mark.parametrize("decay", [0.0, 1e-9, 50.0, 1e4])
def test_extreme_decays(op, decay, close):
    """Nothing forgotten, or everything at every step; and both in turn."""
    tensors = inputs(op, 150, decay=decay)
    both(op, tensors, close)
    tensors["g"][:, ::7] = -decay
    tensors["g"][:, 1::7] = -1e-6
    both(op, tensors, close)


@pytest.mark.parametrize("decay", [0.3, 50.0, 1000.0])
def test_float32_gradients_of_decays(op, decay):
    """A strong decay has no gradient; rounding that is left in its place would be multiplied by its size."""
    tensors = inputs(op, 150, decay=decay)
    tensors["g"][:, 1::3] = -1e-3
    truth = run_with_gradients(op, tensors)["g"] * tensors["g"]  # what reaches log A is g times its gradient
    single = {name: x.float() for name, x in tensors.items()}
    got = run_with_gradients(op, single)["g"] * single["g"]
    assert (got.double() - truth).abs().max() < 1e-5 * truth.abs().max()


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_extreme_beta(beta, close):
    tensors = inputs(gated_delta, 130, decay=0.0)
    tensors["beta"].fill_(beta)
    both(gated_delta, tensors, close)


def test_gradcheck(op):
    """Against finite differences, over three chunks and a document's end."""
    documents = (9, 1, 3)
    tensors = inputs(op, 13, batch=1, rows=3)
    leaves = [x.requires_grad_() for x in tensors.values()]
    with forced("chunked"), chunks_of(4):
        assert torch.autograd.gradcheck(
            lambda *x: op(**dict(zip(tensors, x, strict=True)), packing=packing(documents)), leaves, fast_mode=True
        )


@pytest.mark.parametrize("length", [1, 63, 64, 130])
@pytest.mark.parametrize("theirs", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
def test_delta_is_transformers(theirs, length):
    """An implementation nobody here wrote; it works in float32, keeps states as (k, v) and scales q itself."""
    tensors = inputs(gated_delta, length, dtype=torch.float32)
    calls = {name: x for name, x in tensors.items() if name != "state"}
    want, want_state = theirs(
        calls["q"],
        calls["k"],
        calls["v"],
        calls["g"],
        calls["beta"],
        initial_state=tensors["state"].mT,
        output_final_state=True,
    )
    for name in forms(KERNELS[gated_delta], length):
        with forced(name):
            got, state = gated_delta(**tensors | {"q": tensors["q"] * K**-0.5})
        assert torch.allclose(got, want, atol=2e-5)
        assert torch.allclose(state, want_state.mT, atol=2e-5)


@pytest.mark.parametrize("length", [1, 63, 64, 130])
def test_ssd_is_transformers(length):
    """Its v is x times dt and its g is A times dt; here with one dt of its own per token."""
    tensors = inputs(ssd, length, dtype=torch.float32)
    dt = torch.rand(2, length, HEADS)
    A = -torch.rand(HEADS)
    want, want_state = mamba2_chunk_scan(
        tensors["v"], dt, A, tensors["k"], tensors["q"], 32, initial_states=tensors["state"], return_final_states=True
    )
    calls = tensors | {"v": tensors["v"] * dt[..., None], "g": A * dt}
    for name in forms(KERNELS[ssd], length):
        with forced(name):
            got, state = ssd(**calls)
        assert torch.allclose(got, want, atol=2e-5)
        assert torch.allclose(state, want_state, atol=2e-5)


def test_bfloat16_computes_in_float32(op):
    tensors = inputs(op, 100, dtype=torch.float32)
    rounded = {name: x.bfloat16() if name in "qkv" else x for name, x in tensors.items()}
    y, state = op(**rounded)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    exact, _ = op(**{name: x.float() for name, x in rounded.items()})
    assert torch.equal(y, exact.bfloat16())
