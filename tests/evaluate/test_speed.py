"""Speed is measured where it says, and not changed by measuring."""

import pytest
import torch

import plait
from plait.design.count import state_bytes
from plait.evaluate.speed import speeds

DESIGN = plait.ModelConfig(
    vocab=50, dim=64, pattern="[M|A]D", layers={"M": plait.Mamba2(state_dim=8), "D": plait.GatedDeltaNet(heads=2)}
)


@pytest.fixture
def model():
    return plait.build(DESIGN)


def test_speeds(model):
    results = speeds(model, [40, 8, 40], tokens=3, chunk=16)
    assert [result.context for result in results] == [8, 40, 40]
    for result in results:
        assert result.decode_ms > 0
        assert result.state_bytes == state_bytes(DESIGN, result.context)
    assert results[0].prefill_ms <= results[1].prefill_ms


def test_the_calls_are_the_ones_described(model, monkeypatch):
    calls = []

    def recorded(tokens, state=None, **more):
        calls.append((tuple(tokens.shape), state.lengths))
        return original(tokens, state, **more)

    original = model.features
    monkeypatch.setattr(model, "features", recorded)
    speeds(model, [5, 12], tokens=1, batch=2, chunk=4)
    warm = [((2, 1), (5 + i,) * 2) for i in range(4)]
    later = [((2, 1), (12 + i,) * 2) for i in range(4)]
    assert calls == [((2, 4), (0, 0)), ((2, 1), (4, 4)), *warm, ((2, 4), (5, 5)), ((2, 3), (9, 9)), *later]


def test_recurrent_decoding_is_flat():
    """Sixteen times the context costs a recurrent stack nothing; medians, so that a busy machine does not decide."""
    model = plait.build(DESIGN.replace(pattern="(D)4"))
    short, long = (speed.decode_ms for speed in speeds(model, [128, 2048], tokens=48))
    assert long < 2 * short


@pytest.mark.parametrize("wrong", [{"contexts": []}, {"contexts": [0]}, {"tokens": 0}, {"batch": 0}, {"chunk": 0}])
def test_refusals(model, wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        speeds(model, **{"contexts": [4]} | wrong)


def test_gradients_and_mode_stay_as_they_were(model):
    speeds(model, [4], tokens=1)
    assert torch.is_grad_enabled()
    model(torch.zeros(1, 4, dtype=torch.long))[0].sum().backward()
