"""Memory that nobody wrote is NaN here, so that an op that reads it cannot pass; and words that all op tests share."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from plait.ops.kernels import FEW, Call, Kernels
from plait.ops.packing import Packing

LENGTHS = (1, 2, 63, 64, 65, 100, 257)
DOCUMENTS = (1, 66, 2, 64, 5, 128, 1)


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Close:
    """Differences over the largest value, float64 unless said otherwise."""

    tolerance: float = 1e-10  # rounding is 1e-15, times the 257 steps that it can grow over

    def __call__(self, got: Tensor, want: Tensor) -> None:
        assert got.shape == want.shape
        assert got.isfinite().all()
        if got.numel():
            assert (got - want).abs().max() <= self.tolerance * max(float(want.abs().max()), 0.01)


@pytest.fixture
def close() -> Close:
    return Close()


def run_with_gradients(
    run: Callable[..., tuple[Tensor, Tensor | None]], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Outputs of `run(**tensors)`, and the gradients at all of `tensors` of a fixed sum over them."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    outputs = [x for x in run(**leaves) if x is not None]
    generator = torch.Generator().manual_seed(3)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {str(i): x.detach() for i, x in enumerate(outputs)} | dict(zip(leaves, gradients, strict=True))


def kind(tokens: int) -> str:
    """As a `Call` has it."""
    return "one" if tokens == 1 else "few" if tokens <= FEW else "many"


def forms(kernels: Kernels, count: int) -> list[str]:
    """The names of all forms that fit a call of so many tokens; the reference is the last."""
    call = Call("cpu", torch.float64, kind(count))
    return [kernel.name for kernel in kernels.forms if kernel.supports(call) is None]


def packing(lengths=DOCUMENTS, device="cpu") -> Packing:
    return Packing.of_lengths(lengths, torch.device(device))


@pytest.fixture
def run_checks_in_the_interpreter() -> Callable[[str], None]:
    """Runs a file's `check_*` functions in Triton's interpreter, which has to be chosen before triton is first imported and
    so gets a process of its own."""
    if sys.platform != "linux":
        pytest.skip("Triton exists for Linux only")

    def run(file: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"TRITON_INTERPRET": "1"}
        options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "python_functions=check_*"]
        command = [sys.executable, "-m", "pytest", *options, "-W", "ignore::RuntimeWarning", file]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

    return run
