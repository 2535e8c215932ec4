"""Every family of transformers that plait reads: the same numbers on every path, and the way back."""

import pytest

from plait.hub.families import NAMES, TRANSFORMERS, family
from plait.hub.parity import LAWS, parity


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_parity(name: str, seed: int) -> None:
    results = list(parity([name], [seed]))
    assert {result.law for result in results} == LAWS.keys()
    assert not [(result.law, result.message) for result in results if result.message]


@pytest.mark.parametrize("name", NAMES)
def test_a_family_names_itself(name: str) -> None:
    assert family(name).model_type == name


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'qwen2'"):
        family("qwen22")
