"""The laws of `plait.evaluate.laws` on all its designs, on the CPU. `plait selfcheck` runs the same functions."""

import pytest
import torch

from plait.evaluate.laws import DESIGNS, LAWS, packages
from plait.evaluate.laws.models import compiled, has_compiler

CHECKED = [name for name in LAWS if name != "compiled"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
@pytest.mark.parametrize("law", CHECKED)
def test_law(law, design, dtype):
    LAWS[law](design, "cpu", dtype)


# tracing takes as long as a design is deep; these repeat what others have
DEEP = (
    *("((DF)3 AF)2", "((GF)3 AF)2", "((SF)3 AF)2", "[WF|DAF]:average [A|[M|D]:gated]"),
    *("[M[A|D]:sum|W]F", "[A|M|D]:projection F", "shared layers"),
)


@pytest.mark.parametrize("name", [name for name in DESIGNS if name not in DEEP])
def test_compiles_as_one_graph(name):
    compiled(DESIGNS[name], "cpu", torch.float32)


@pytest.mark.skipif(not has_compiler(), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["AF", "DF"])
def test_compiles_to_code(name):
    compiled(DESIGNS[name], "cpu", torch.float32, backend="inductor")


def test_kernel_packages_without_a_gpu_are_left_alone():
    packages(list(DESIGNS.values()))
