"""How weights are drawn: each from the seed and its own name, so that changing one layer redraws no other."""

import hashlib

import torch
from torch import Tensor, nn

from plait.design.weights import Constant, Normal, Ramp, Uniform, Weight, Weights


def empty(weight: Weight) -> nn.Parameter:
    """Room for a weight, float32 whatever the process's default is."""
    return nn.Parameter(torch.empty(weight.shape, dtype=torch.float32), requires_grad=weight.role != "balance")


def start(module: nn.Module, weights: Weights, seed: int) -> None:
    """Draw the parameters of `module` that `weights` declares, in place and on their device."""
    parameters = dict(module.named_parameters())
    for weight in weights:
        with torch.no_grad():
            parameters[weight.name].copy_(drawn(weight, seed))


def drawn(weight: Weight, seed: int) -> Tensor:
    """The first values of a weight, float32 on the CPU: a function of seed and key alone."""
    start = weight.start
    values = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    if isinstance(start, Constant):
        return values.fill_(start.value)
    if isinstance(start, Ramp):
        return _ramp(values, start)
    digest = hashlib.blake2b(f"{seed}:{weight.key}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
    if isinstance(start, Normal):
        return values.normal_(0.0, start.std, generator=generator)
    assert isinstance(start, Uniform), f"{weight.name} has no start"
    return _after(values.uniform_(start.low, start.high, generator=generator), start.then)


def _after(x: Tensor, then: str) -> Tensor:
    if then == "log":
        return x.log_()
    if then == "step":  # the inverse of softplus, at exp x
        return _before_softplus(x.exp_())
    if then == "rg_lru":
        return _before_softplus(x.log_().div_(-8))
    return x


def _before_softplus(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))


def _ramp(values: Tensor, ramp: Ramp) -> Tensor:
    steps = torch.linspace(ramp.low, ramp.high, ramp.k, dtype=torch.float32, device="cpu")
    if ramp.power != 1:
        evenly = torch.linspace(0, 1, ramp.k, dtype=torch.float32, device="cpu")
        steps = ramp.low + (ramp.high - ramp.low) * evenly**ramp.power
    values.zero_().view(ramp.runs, -1, ramp.k)[ramp.index] = _after(steps, ramp.then)
    return values
