"""What a device can do at most, measured: how fast it multiplies matrices, and how fast it copies."""

from dataclasses import dataclass

import torch

from plait.evaluate.clock import seconds

SIDES = {
    "cuda": 8192
}  # of the square matrices: as large as makes a device busy, and elsewhere small enough to be quick
SIDE = 1024
COPIED = {"cuda": 2**30}  # bytes, far more than caches hold
COPIES = 2**28
WARM_UP, ROUNDS = 2, 8


@dataclass(frozen=True, slots=True)
class Limits:
    """products: FLOP/s of one product of two `side` x `side` matrices in `dtype`. copies: bytes a second that a copy of
    `copied` bytes reads and writes, together. Each the quickest of several."""

    dtype: str
    products: float
    side: int
    copies: float
    copied: int


def limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measured now, in this process; what was allocated for it is given back."""
    side, copied = SIDES.get(device.type, SIDE), COPIED.get(device.type, COPIES)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    product_s = min(seconds(lambda: torch.mm(a, b, out=product), device, WARM_UP + ROUNDS)[WARM_UP:])
    del a, b, product
    x = torch.zeros(copied, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copy_s = min(seconds(lambda: y.copy_(x), device, WARM_UP + ROUNDS)[WARM_UP:])
    del x, y
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Limits(str(dtype).removeprefix("torch."), 2 * side**3 / product_s, side, 2 * copied / copy_s, copied)
