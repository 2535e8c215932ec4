"""Muon: torch's numbers, and products in the dtype that the device is quick in."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from plait.model import build
from plait.ops.instructions import WITHOUT_BFLOAT16, cpu_bfloat16, fast_dtype
from plait.train import RunConfig
from plait.train import muon as muon_module
from plait.train.muon import Muon, alike, orthogonal
from plait.train.optim import Optimizers

SHAPES = [(24, 24), (16, 40), (40, 16), (16, 40), (1, 8), (8, 1), (16, 40)]
CPU = torch.device("cpu")


class Products(TorchDispatchMode):
    """The dtypes that matrices were multiplied in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "matmul"):
            self.seen |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def trained(make, steps: int = 3) -> list[nn.Parameter]:
    """Weights after steps with drawn gradients; one of them never gets any, one gets zeros."""
    parameters = weights()
    optimizer, generator = make(parameters), torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters[1:]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        parameters[2].grad = torch.zeros_like(parameters[2])
        optimizer.step()
    return parameters


@pytest.mark.parametrize("at_once", [1, 1500, 1 << 24])
def test_it_is_torchs_muon_up_to_the_rounding_of_bfloat16(monkeypatch, at_once):
    monkeypatch.setattr(muon_module, "AT_ONCE", at_once)
    lr, decay = 0.05, 0.3
    theirs = trained(lambda p: torch.optim.Muon(p, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(muon_module, "fast_dtype", lambda device, dtype=dtype: dtype)
        ours = trained(lambda p: Muon(p, lr=lr, weight_decay=decay))
        assert torch.equal(ours[0], weights()[0])  # no gradient, no step
        for one, other, before in zip(ours[1:], theirs[1:], weights()[1:], strict=True):
            assert (one - other).norm() <= 0.02 * (other - before).norm()


def test_blocks_of_rows_are_matrices_of_their_own(monkeypatch):
    """Three projections in one: as three parameters are updated, and not as one is."""
    rows = (8, 16, 8)
    fused = torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(32, 24, generator=torch.Generator().manual_seed(1))

    def stepped(matrices, gradients, **group):
        parameters = [nn.Parameter(matrix.clone()) for matrix in matrices]
        for parameter, grad in zip(parameters, gradients, strict=True):
            parameter.grad = grad.clone()
        Muon([{"params": parameters, **group}], lr=0.1, weight_decay=0.2).step()
        return torch.cat([parameter.detach() for parameter in parameters])

    apart = stepped(fused.split(rows), gradient.split(rows))
    torch.testing.assert_close(stepped([fused], [gradient], blocks=[rows]), apart)
    assert (stepped([fused], [gradient]) - apart).abs().max() > 0.01


def test_in_float32_it_is_the_paper_s_iteration_in_float64():
    for shape in SHAPES:
        matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        s = s / s.norm(dim=-1, keepdim=True)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        torch.testing.assert_close(
            orthogonal(matrix, torch.float32).double(), u @ s.diag_embed() @ v, rtol=0, atol=1e-4
        )


def test_equal_shapes_go_together_and_none_is_lost(monkeypatch):
    monkeypatch.setattr(muon_module, "AT_ONCE", 1300)  # two of the three of 640
    groups = list(alike([(matrix, matrix) for matrix in weights()]))
    assert sorted(len(group) for group in groups) == [1, 1, 1, 1, 1, 2]
    assert sum(len(group) for group in groups) == len(SHAPES)
    assert all(len({matrix.shape for matrix, _ in group}) == 1 for group in groups)


def products_of_a_step() -> set[torch.dtype]:
    model = build({"vocab": 64, "dim": 64, "pattern": "[D|A]F"})
    optimizers = Optimizers(model, RunConfig(design="AF", optimizer="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Products() as products:
        optimizers.step(1)
    return products.seen


def test_a_step_multiplies_in_the_fast_dtype_alone(monkeypatch):
    assert products_of_a_step() == {fast_dtype(CPU)}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert products_of_a_step() == {torch.float32}


@pytest.mark.parametrize(
    ("has", "found"),
    [
        ({}, None),
        ({"capability": "AVX512"}, None),
        ({"capability": "AVX512", "bf16": True}, "AVX512_BF16"),
        ({"capability": "AVX512", "bf16": True, "amx": True}, "AMX"),
        ({"capability": "AVX2", "bf16": True, "amx": True}, None),  # ATEN_CPU_CAPABILITY=avx2
        ({"capability": "NEON"}, None),
        ({"capability": "AVX512", "amx": True, "onednn": False}, None),
        *(({"capability": "AVX512", "amx": True, "cap": cap.lower()}, None) for cap in sorted(WITHOUT_BFLOAT16)),
        ({"capability": "AVX512", "bf16": True, "cap": "avx512_core_bf16"}, "AVX512_BF16"),
    ],
)
def test_what_the_processor_has_is_read_and_not_measured(monkeypatch, has, found):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: has.get("capability", "DEFAULT"))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has.get("onednn", True))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has.get("bf16", False))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has.get("amx", False))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", has.get("cap", ""))
    assert cpu_bfloat16() == found
    assert fast_dtype(CPU) == (torch.bfloat16 if found else torch.float32)


def test_the_variables_that_make_a_processor_plain_are_heeded():
    code = "import torch; from plait.ops.instructions import fast_dtype; print(fast_dtype(torch.device('cpu')))"
    for variable in ({"ATEN_CPU_CAPABILITY": "avx2"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}):
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | variable, capture_output=True, text=True)
        assert done.stdout == "torch.float32\n"


def test_the_state_has_the_names_that_checkpoints_know():
    model = build({"vocab": 64, "dim": 64, "pattern": "AF"})
    optimizers = Optimizers(model, RunConfig(design="AF", optimizer="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(1)
    names = {name.rpartition(".")[2] for name in optimizers.tensors() if name.startswith("slots.0.q_proj")}
    assert names <= {"momentum_buffer"}
    assert any(name.endswith(".momentum_buffer") for name in optimizers.tensors())
