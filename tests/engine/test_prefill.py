"""A prompt read in chunks is the prompt read whole, and what is kept of it does not grow where nothing has to."""

import pytest
import torch

import plait
from plait.engine import prefill
from plait.state import ModelState

CONSTANT = ("(DF)3 WF", "(DF)2", "MF WF", "DnF KF")
DESIGNS = ("(AF)2", "(DF)3 AF", "[M|A]F", "GF LF WF", *CONSTANT)
WINDOW = {"kind": "attention", "window": 6, "prefix": 2}


def tiny(pattern, dtype=torch.float64):
    design = {"vocab": 41, "dim": 64, "pattern": pattern, **({"layers": {"W": WINDOW}} if "W" in pattern else {})}
    return plait.build(design, dtype=dtype).eval()


def prompt(length):
    return torch.randint(41, (length,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("pattern", DESIGNS)
@pytest.mark.parametrize("chunk", [1, 5, 64])
@torch.inference_mode()
def test_in_chunks_as_in_one(pattern, chunk, monkeypatch):
    """In float64, past what one chunk, one window, or a chunk of a recurrence holds; and tokens after it."""
    model, tokens = tiny(pattern), prompt(150 if chunk > 1 else 20)
    hidden, state = model.features(torch.tensor([tokens]), model.init_state(1, 200))
    monkeypatch.setattr(prefill, "CHUNK", chunk)
    last, pieces = prefill.prefill(model, [tokens], 50)
    torch.testing.assert_close(last, hidden[:, -1], rtol=0, atol=1e-10)
    more = torch.tensor([[7, 8, 9]])
    want, got = (model(more, start)[0] for start in (state, pieces))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def held(state: ModelState) -> int:
    """Bytes of all memory that the state keeps alive, not only of what it shows."""
    memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in state.tensors().values()}
    return sum(memory.values())


@pytest.mark.parametrize("pattern", CONSTANT)
@torch.inference_mode()
def test_recurrences_and_windows_keep_as_much_of_long_prompts(pattern):
    model, sizes = tiny(pattern, torch.float32), {}
    for length in (2000, 9000):  # one chunk, and several
        _, state = prefill.prefill(model, [prompt(length)], 0)
        sizes[length] = held(state), state.nbytes
    assert sizes[2000] == sizes[9000]
    kept, shown = sizes[9000]
    assert kept <= 2 * shown  # and nothing of the chunk that it came from
