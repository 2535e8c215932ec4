"""A step on a CPU: which products it takes, and that torch is as it was afterwards."""

import pytest
import torch

import plait
from plait.engine import Decoding

PROMPT = [1, 2, 3]


@pytest.mark.parametrize(
    ("dtype", "rows", "mkldnn"), [(torch.bfloat16, 1, False), (torch.bfloat16, 2, True), (torch.float32, 1, True)]
)
def test_one_bfloat16_row_is_multiplied_by_torch_itself(dtype, rows, mkldnn, monkeypatch):
    model = plait.build({"vocab": 41, "dim": 64, "pattern": "AF"}, dtype=dtype).eval()
    decoding, step, seen = Decoding(model, [PROMPT] * rows, max_tokens=4), model.step, []

    def watched(*given):
        seen.append(torch.backends.mkldnn.enabled)
        return step(*given)

    monkeypatch.setattr(model, "step", watched)
    for _ in range(3):
        decoding.step()
    assert seen == [mkldnn] * 2
    assert torch.backends.mkldnn.enabled


def test_torch_is_as_it_was_after_an_error(monkeypatch):
    model = plait.build({"vocab": 41, "dim": 64, "pattern": "AF"}, dtype=torch.bfloat16).eval()
    decoding = Decoding(model, [PROMPT], max_tokens=4)
    monkeypatch.setattr(model, "step", lambda *given: 1 / 0)
    decoding.step()
    with pytest.raises(ZeroDivisionError):
        decoding.step()
    assert torch.backends.mkldnn.enabled
