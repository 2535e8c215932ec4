"""Which form runs, and the chunk layout that the fast ones share."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.ops import attention, conv, delta, ssd
from plait.ops.decay import chunk_decay
from plait.ops.kernels import Call, Kernel, always, choose, explain, forced, many_tokens
from plait.ops.packing import chunks
from tests.ops.conftest import packing

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=8)


KERNELS = (Kernel("chunked", lambda: 1, many_tokens), Kernel("reference", lambda: 2, always))
ONE, MANY = torch.zeros(1, 1, 2, 3), torch.zeros(1, 9, 2, 3)


def test_the_first_form_that_fits():
    assert choose(KERNELS, ONE).name == "reference"
    assert choose(KERNELS, MANY).name == "chunked"


def test_explain_says_why_not():
    (name, why), used = explain(KERNELS, Call(1, "cpu", torch.float32))
    assert name == "chunked"
    assert "one token" in why
    assert used == ("reference", "used")
    assert explain(KERNELS, Call(2, "cpu", torch.float32))[1] == ("reference", "fits, but a faster form comes first")


@pytest.mark.parametrize("op", [attention, conv, delta, ssd])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_every_call_has_a_form_and_the_reference_is_the_last_resort(op, device):
    assert op.KERNELS[-1].name == "reference"
    for tokens in (1, 2, 5000):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            assert op.KERNELS[-1].supports(Call(tokens, device, dtype)) is None


def test_forced_form_and_back():
    with forced("reference"):
        assert choose(KERNELS, MANY).name == "reference"
        with forced(None):
            assert choose(KERNELS, MANY).name == "chunked"
    assert choose(KERNELS, MANY).name == "chunked"


def test_forced_by_the_environment():
    script = "import torch; from plait.ops.delta import KERNELS; from plait.ops.kernels import choose; "
    script += "print(choose(KERNELS, torch.zeros(1, 9, 2, 3)).name)"
    environment = os.environ | {"PLAIT_KERNELS": "reference"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "reference"


def test_a_form_that_does_not_exist():
    with forced("referense"), pytest.raises(ValueError, match="no such kernel; did you mean 'reference'"):
        choose(KERNELS, MANY)


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
