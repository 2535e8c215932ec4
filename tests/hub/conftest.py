"""A tiny model in transformers' clothes."""

import pytest
import torch

import plait
from plait.hub import PlaitConfig, PlaitForCausalLM


@pytest.fixture
def hub():
    """Builds a PlaitForCausalLM with weights of seed 1."""

    def make(pattern="DF AF", vocab=41, dtype=torch.float64, kind=PlaitForCausalLM, **options):
        torch.manual_seed(1)
        design = plait.ModelConfig(vocab=vocab, dim=64, pattern=pattern, **options)
        return kind(PlaitConfig(design=design)).to(dtype).eval()

    return make
