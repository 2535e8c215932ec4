"""Any design that can be written keeps every law: 200 of them, each under one law."""

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from plait.design.ends import FRONT_KINDS, HEAD_KINDS
from plait.design.layers import KINDS
from plait.design.merges import MERGE_KINDS
from plait.design.norms import NORM_KINDS
from plait.design.wrap import Wrap
from plait.evaluate.laws import LAWS
from plait.evaluate.laws.space import drawn, options_of, random_designs

CHECKED = sorted(set(LAWS) - {"compiled"})  # which takes seconds a layer; tests/laws.py compiles each once


@st.composite
def designs(draw):
    try:
        return drawn(lambda options: draw(st.sampled_from(options)))
    except ValueError:  # options that do not go together
        reject()


@pytest.mark.filterwarnings("ignore:.*gradients do not settle in chunks")  # said, and solved token by token (law 12)
@settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(designs(), st.sampled_from(CHECKED))
def test_any_design_keeps_any_law(design, law):
    LAWS[law](design, "cpu", torch.float64)


@pytest.mark.parametrize(
    "kind",
    [*KINDS.values(), *MERGE_KINDS.values(), *NORM_KINDS.values(), *FRONT_KINDS.values(), *HEAD_KINDS.values(), Wrap],
)
def test_every_option_is_drawn(kind):
    """A field that nobody has thought of is an error, not an option that is never tried."""
    assert all(options_of(kind).values())


def test_the_same_designs_each_time():
    assert [design.hash for design in random_designs(5)] == [design.hash for design in random_designs(5)]
