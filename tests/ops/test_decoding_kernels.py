"""A decoding step whose kernels do several layers' things at once gives what the layers give one by one.

The kernels run in Triton's interpreter, which has to be chosen before triton is first imported, so that check has a process of
its own; who runs what when is tested with torch alone.
"""

import pytest
import torch

import plait
from plait.model import language_model
from plait.ops import rms_norm, rotary, swiglu
from plait.ops.attention.paged import placed

TWICE = {"kind": "gated_deltanet", "heads": 2, "head_dim": 16, "value_heads": 4}
NORMED = {"kind": "attention", "kv_heads": 1, "qk_norm": True, "output_gate": True, "rope": {"fraction": 0.5}}
PATTERNS = (
    "(DF)2 AF",
    {"pattern": "(AF)2", "layers": {"A": NORMED}},
    "[D|A]F MF",
    {"pattern": "AF DF", "norm": {"kind": "layer_norm"}},
    {"pattern": "(DF)2", "norm": {"kind": "rms_norm", "zero_centered": True}, "layers": {"D": TWICE}},
)
PROMPTS, STEPS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), 3


def test_kernels_in_the_interpreter(run_checks_in_the_interpreter):
    run_checks_in_the_interpreter(__file__)


def built(design, dtype=torch.float32):
    design = {"pattern": design} if isinstance(design, str) else design
    return plait.build({"vocab": 41, "dim": 64, **design}, dtype=dtype).eval()


@torch.no_grad()
def decoded(model):
    """Features of some steps on rows of a pool, and the pool's tensors after them."""
    pool = model.init_pool(3, 16)
    _, state = model(PROMPTS, model.init_state(2))
    at = pool.at(pool.join(state))
    steps = []
    for token in range(STEPS):
        pool.reserve(at.rows, 1)
        steps.append(model.step(PROMPTS[:, token : token + 1], at))
        pool.advance(at.rows, 1)
    return torch.cat(steps, 1), pool.tensors


@pytest.mark.parametrize("design", PATTERNS, ids=str)
def check_steps(design, monkeypatch):
    """All kernels at once, beside the same model in float64 that knows none of them."""
    model, twin = built(design), built(design, torch.float64)
    twin.load_state_dict(model.state_dict())
    want, want_tensors = decoded(twin)
    used = []
    for room, name in ((language_model, "few_rows"), (rms_norm, "few_rows"), (rotary, "few_rows"), (placed, "fits")):
        key = f"{room.__name__}.{name}"
        monkeypatch.setattr(room, name, lambda *given, key=key, **more: used.append(key) or given[0].shape[1] == 1)
    monkeypatch.setattr(swiglu, "swiglu", swiglu._rows)
    got, tensors = decoded(model)
    rooms = [language_model.__name__ + ".few_rows", placed.__name__ + ".fits"]
    pattern = design if isinstance(design, str) else design["pattern"]
    assert {rooms[0], *([rooms[1]] if "A" in pattern else [])} <= set(used)
    for one, other in ((got, want), *((tensors[name], want_tensors[name]) for name in want_tensors)):
        assert (one.double() - other.double()).abs().max() <= 1e-5 * other.abs().max()


@pytest.fixture
def announced(monkeypatch):
    """Sums and norms in one go on a CPU, too."""
    monkeypatch.setattr(language_model, "few_rows", lambda x: True)


@pytest.mark.parametrize("design", PATTERNS, ids=str)
def test_the_same_numbers_where_sums_and_norms_go_together(design, monkeypatch):
    model = built(design)
    want, want_tensors = decoded(model)
    sums, of_sum = [], type(model.norm).of_sum
    monkeypatch.setattr(language_model, "few_rows", lambda x: True)
    monkeypatch.setattr(type(model.norm), "of_sum", lambda *given: sums.append(given) or of_sum(*given))
    got, tensors = decoded(model)
    assert len(sums) == STEPS * len(model.slots)
    assert torch.equal(got, want)
    assert all(torch.equal(tensors[name], want_tensors[name]) for name in want_tensors)


@pytest.mark.usefixtures("announced")
def test_a_hook_on_a_norm_is_called():
    model, called = built("DF AF"), []
    for norm in (model.slots[1].norm, model.norm):
        norm.register_forward_hook(lambda *given: called.append(given[0]))
    decoded(model)
    assert len(called) == 2 * (1 + STEPS)  # the prompt, and each step


@pytest.mark.usefixtures("announced")
def test_what_stands_in_for_a_stream_is_normed_anew():
    """What was left of one stream is of no use to a slot that reads another."""
    model = built("DF AF")
    want = decoded(model)[0]
    handle = model.slots[1].register_forward_pre_hook(lambda slot, given: (2 * given[0], *given[1:]))
    changed = decoded(model)[0]
    handle.remove()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "few_rows", lambda x: False)
        model.slots[1].register_forward_pre_hook(lambda slot, given: (2 * given[0], *given[1:]))
        assert torch.equal(changed, decoded(model)[0])
    assert not torch.equal(changed, want)
