"""What a config takes for a number."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import plait
from plait.design import load_design
from plait.engine.sampling import Sampling
from plait.train import RunConfig


@pytest.mark.parametrize("library", [np.int64, np.float32, np.array, torch.tensor, Decimal, Fraction])
def test_numbers_of_any_library_are_taken_exactly(library):
    four, half = library(4), np.float32(0.5) if library is np.int64 else library(0.5)
    run = RunConfig(design="AF", steps=four, lr=half, clip=half, betas=(half, half), data={"length": four})
    assert run == RunConfig(design="AF", steps=4, lr=0.5, clip=0.5, betas=(0.5, 0.5), data={"length": 4})
    design = {"dim": library(64), "vocab": four, "pattern": "AF", "at": {"A#0": {"heads": four}}}
    assert plait.ModelConfig(**design).to_dict() == load_design(design).to_dict()
    assert load_design(design, **{"at.A#0.head_dim": four}).place("A#0").layer.head_dim == 4
    assert Sampling(temperature=half, top_k=four) == Sampling(temperature=0.5, top_k=4)
    for config, name in (
        (RunConfig, "steps"),
        (Sampling, "seed"),
        (plait.ModelConfig, "dim"),
        (plait.Attention, "heads"),
    ):
        for value in (library([4, 4]) if library in (np.array, torch.tensor) else half, object(), 1j, np.bool_(True)):
            with pytest.raises(ValueError, match=rf"{config.__name__}.{name}: expected a whole number"):
                config(**{name: value})
