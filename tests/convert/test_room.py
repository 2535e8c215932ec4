"""Stages on GPUs of several sizes."""

from typing import Any

import pytest

import plait
from plait.convert.room import GIB, in_parts
from plait.train import RunConfig

DESIGN = plait.ModelConfig(vocab=49_152, dim=576, pattern="(AF)30")


def run(**changes: Any) -> RunConfig:
    data = {"source": "stdlib", "length": changes.pop("length", 1024)}
    return RunConfig(design="AF", data=data, **{"batch": 24, "precision": "bfloat16", **changes})


def parts(memory: float, **changes: Any) -> int:
    return in_parts(run(**changes), DESIGN, DESIGN, int(memory * GIB)).accumulate


def test_a_step_is_cut_into_parts_that_fit() -> None:
    assert parts(80) == 1  # measured: 27.4 GiB in one part on an H100
    assert 1 < parts(24) <= 3
    assert parts(24, accumulate=6) == 6
    assert parts(24, precision="float32") > parts(24)
    assert parts(24, activation_checkpointing=True) == 1
    assert all(parts(memory) >= parts(memory + 4) for memory in range(6, 40, 4))


@pytest.mark.parametrize(
    ("memory", "changes", "would"),
    [
        (8, {"length": 8192}, r"training\.activation_checkpointing=true fits"),
        (8, {"length": 32_768}, r"with length [\d,]+ fits"),
        (2, {}, "take a larger GPU or a smaller teacher"),
    ],
)
def test_a_gpu_too_small_says_what_would_fit(memory: float, changes: dict[str, Any], would: str) -> None:
    with pytest.raises(ValueError, match=f"this GPU has {memory}.0 GiB, and training needs about .*; .*{would}"):
        parts(memory, **changes)


def test_what_is_said_to_fit_does() -> None:
    with pytest.raises(ValueError, match="with length") as refused:
        parts(8, length=32_768)
    length = int(str(refused.value).split("with length ")[1].split(" ")[0].replace(",", ""))
    assert parts(8, length=length, activation_checkpointing=True) >= 1
