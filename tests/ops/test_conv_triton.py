"""The convolution over many tokens on a GPU: the Triton kernels, in Triton's interpreter, against the definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.conv import KERNELS
from plait.ops.packing import Packing

WITHIN = 2e-6  # of the largest value: float32, sums over 4 taps and 66 tokens
ROWS = {"rows": (2, (33,)), "packed": (1, (1, 34, 2, 29))}


def test_kernels_in_the_interpreter(run_checks_in_the_interpreter):
    run_checks_in_the_interpreter(__file__)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("channels", "width", "bias"), [(70, 4, True), (20, 3, False)])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def check_outputs_and_gradients(
    rows: tuple[int, tuple[int, ...]], channels: int, width: int, bias: bool, with_state: bool, silu: bool, monkeypatch
):
    from plait.ops.conv import tokens_triton

    monkeypatch.setattr(tokens_triton, "STEPS", 24)  # so that there are several programs, the last of them cut short
    torch.manual_seed(0)
    b, lengths = rows
    packing = Packing.of_lengths(lengths, torch.device("cpu")) if len(lengths) > 1 else None
    x = torch.randn(b, sum(lengths), 2 * channels)[:, :, :channels]  # cut out of a projection
    weight, shift = torch.randn(channels, width), torch.randn(channels) if bias else None
    tail = torch.randn(b if packing is None else len(lengths), width - 1, channels) if with_state else None
    given = [y for y in (x, weight, shift, tail) if y is not None]
    form = next(kernel for kernel in KERNELS.forms if kernel.name == "tokens")

    def values(run, wide: bool) -> list[Tensor]:
        leaves = [(y.double() if wide else y.clone()).requires_grad_() for y in given]
        own = iter(leaves)
        named = [next(own) if y is not None else None for y in (x, weight, shift, tail)]
        outputs = [y for y in run(*named) if y is not None]
        generator = torch.Generator().manual_seed(3)
        loss = sum((y.double() * torch.randn(y.shape, generator=generator)).sum() for y in outputs)
        return [*(y.detach() for y in outputs), *torch.autograd.grad(loss, leaves)]

    def truth(x, weight, shift, tail):
        slow = next(kernel for kernel in KERNELS.forms if kernel.name == "reference")
        y, state = slow.run(x, weight, shift, state=tail, packing=packing)
        return F.silu(y) if silu else y, state

    ours = values(lambda x, w, s, tail: form.run(x, w, s, state=tail, packing=packing, silu=silu), False)
    for one, other in zip(ours, values(truth, True), strict=True):
        assert (one.double() - other).abs().max() <= WITHIN * other.abs().max()
