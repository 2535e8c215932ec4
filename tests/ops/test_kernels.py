"""Which form runs, and the chunk layout that the fast ones share."""

import os
import pkgutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import plait.ops
from plait.ops import conv, delta
from plait.ops.decay import chunk_decay
from plait.ops.kernels import FEW, OPS, Call, Kernel, Kernels, always, choose, explain, forced, kernels_of, one_token
from plait.ops.packing import chunks
from tests.ops.conftest import packing

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=8)


KERNELS = Kernels("ssd", (Kernel("step", lambda: 1, one_token), Kernel("reference", lambda: 2, always)))
ONE, MANY = torch.zeros(1, 1, 2, 3), torch.zeros(1, 9, 2, 3)


def test_the_first_form_that_fits():
    assert choose(KERNELS, ONE).name == "step"
    assert choose(KERNELS, MANY).name == "reference"


def test_a_choice_knows_the_kind_of_call_and_no_lengths():
    seen = []
    kernels = Kernels("ssd", (Kernel("all", lambda: 1, lambda call: seen.append(call)),))
    for tokens in (1, 2, FEW, FEW + 1, 5000, 1, 3, 77):
        with torch.no_grad():
            choose(kernels, torch.zeros(2, tokens), packed=tokens > 2, pooled=tokens == 1, sizes=("a size",))
    assert [call.tokens for call in seen] == ["one", "few", "few", "many"]
    assert seen[0] == Call("cpu", torch.float32, "one", False, False, True, False, ("a size",), None)
    assert [call.packed for call in seen] == [False, False, True, True]


def test_explain_says_why_not():
    (name, why), used = explain(KERNELS, Call("cpu", torch.float32, "few"))
    assert name == "step"
    assert why == "only for a single token"
    assert used == ("reference", "used")
    fits = ("reference", "fits, but another form comes first")
    assert explain(KERNELS, Call("cpu", torch.float32, "one"))[1] == fits


@pytest.mark.parametrize("op", OPS)
def test_every_call_has_a_form_and_the_reference_is_the_last_resort(op):
    kernels = kernels_of(op)
    assert kernels.op == op
    assert kernels.forms[-1].name == "reference"
    for device in ("cpu", "cuda", "mps"):
        for tokens in ("one", "few", "many"):
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                assert kernels.forms[-1].supports(Call(device, dtype, tokens)) is None


def test_every_op_is_listed():
    folders = {module.name for module in pkgutil.walk_packages(plait.ops.__path__, "plait.ops.") if module.ispkg}
    folders -= {name for name in folders if name.endswith(".triton")}
    assert {place.partition(":")[0] for place in OPS.values()} == folders


def test_forced_forms_and_back():
    with forced("reference"):
        assert choose(KERNELS, ONE).name == "reference"
        with forced("delta=chunked, ssd=step"):
            assert choose(KERNELS, ONE).name == "step"
            assert choose(delta.KERNELS, ONE).name == "chunked"
            assert choose(conv.KERNELS, ONE).name == "step"
        with forced("reference,ssd=step"):
            assert choose(KERNELS, ONE).name == "step"
            assert choose(conv.KERNELS, ONE).name == "reference"
        with forced(None):
            assert choose(KERNELS, ONE).name == "step"
    assert choose(KERNELS, ONE).name == "step"


def test_forced_by_the_environment():
    script = "import torch; from plait.ops import conv, delta; from plait.ops.kernels import choose; "
    script += "print(*(choose(op.KERNELS, torch.zeros(1, 9, 2, 3)).name for op in (conv, delta)))"
    environment = os.environ | {"PLAIT_KERNELS": "delta=reference"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "chunked reference"


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ("referense", "ssd has no form 'referense'; did you mean 'reference'"),
        ("sdd=step", "there is no op 'sdd'; did you mean 'ssd'"),
        ("ssd=step", "ssd=step does not fit this call: only for a single token"),
    ],
)
def test_forms_that_cannot_be_forced(forms, message):
    with pytest.raises(ValueError, match=f"PLAIT_KERNELS: {message}"), forced(forms):
        choose(KERNELS, MANY)


def test_explain_knows_what_is_forced():
    with forced("ssd=reference"):
        rows = explain(KERNELS, Call("cpu", torch.float32, "one"))
        assert rows == [("step", "fits, but 'reference' is forced"), ("reference", "used, forced")]


@given(lengths, st.integers(1, 50))
@settings(deadline=None)
def test_chunks_of_packed_documents(documents, size):
    x = torch.arange(1.0, sum(documents) + 1)[None, :, None, None].expand(-1, -1, 3, 2)
    layout = packing(documents).chunks(size)
    split = layout.split(x)
    assert split.shape == (sum(layout.alive), 3, size, 2)
    assert torch.equal(layout.join(split), x)
    assert split.count_nonzero() == x.numel()  # every token once, zeros elsewhere
    state = torch.arange(len(documents))
    assert torch.equal(layout.unsort(layout.sort(state)), state)


@given(st.integers(1, 3), st.integers(1, 90), st.integers(1, 50))
@settings(deadline=None)
def test_chunks_of_rows(batch, length, size):
    x = torch.rand(batch, length, 3, 2)
    layout = chunks(batch, length, size, None)
    assert layout.split(x).shape == (sum(layout.alive), 3, size, 2)
    assert torch.equal(layout.join(layout.split(x)), x)


@given(lengths)
@settings(deadline=None)
def test_documents_as_rows(documents):
    row = packing(documents)
    x = torch.rand(1, sum(documents), 3)
    rows = row.to_rows(x)
    assert rows.shape == (len(documents), max(documents), 3)
    assert torch.equal(row.from_rows(rows), x)
    assert row.offsets[0].tolist() == [i for n in documents for i in range(n)]
    assert row.documents.tolist() == [d for d, n in enumerate(documents) for _ in range(n)]


def test_decays_of_a_chunk():
    g = -torch.rand(2, 6, dtype=torch.float64)
    to_token, pairs, to_end = chunk_decay(g)
    for i in range(6):
        assert torch.allclose(to_token[:, i], g[:, : i + 1].sum(1).exp())
        assert torch.allclose(to_end[:, i], g[:, i + 1 :].sum(1).exp())
        for j in range(6):
            want = g[:, j + 1 : i + 1].sum(1).exp() if j <= i else torch.zeros(2, dtype=torch.float64)
            assert torch.allclose(pairs[:, i, j], want)


def test_a_gentle_step_after_a_strong_decay():
    """The sum of logs is large there, and float32 would have forgotten the step."""
    g = torch.tensor([[-3000.0, -1e-3, -1e-3]])
    _, pairs, to_end = chunk_decay(g)
    assert pairs[0, 2, 1] == pytest.approx(torch.tensor(-1e-3).exp().item(), abs=1e-7)
    assert to_end[0, 0] == pytest.approx(torch.tensor(-2e-3).exp().item(), abs=1e-7)
