"""A training step, timed: tokens a second beside the fastest that the device could do it in, memory, and where the time goes.

Every step is what `plait train` does: batches read ahead in a thread, mean loss of next tokens, gradients clipped, AdamW. The
text is random ids: time does not depend on what they say.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plait.data.loader import Batch
from plait.design import ModelConfig
from plait.design.count import flops_per_token, parameters
from plait.design.ends import Logits, Tokens
from plait.design.spec import BYTES
from plait.design.spelling import suggest
from plait.design.summary import si, size
from plait.evaluate.clock import intervals, now
from plait.evaluate.kernels import Kernel, kernels
from plait.evaluate.limits import Limits, limits
from plait.evaluate.room import largest, no_memory, release
from plait.layers import Channels
from plait.model import NextToken, build
from plait.model.device import find_device, memory
from plait.model.recompute import Choice
from plait.ops.instructions import fast_dtype
from plait.ops.numbers import whole_number
from plait.train.ahead import Ahead
from plait.train.config import RunConfig
from plait.train.optim import Optimizers
from plait.train.step import backward, compile_slots

WARM_UP = 3  # steps before those that count: with torch.compile, packed documents have a second graph
PROFILED = 2
KEPT = 16  # bytes a parameter: a float32 weight, its gradient and AdamW's two moments
UPDATED = 28  # bytes a parameter: AdamW reads all four and writes all but the gradient
GRADIENT = 8  # bytes a parameter: a gradient is written, and read for the norm of all
MIDDLE = math.log(600) - 0.5  # of the logarithms of documents' lengths, which are 600 tokens on average
GRID = 65  # contexts between which FLOPs are taken for straight lines, as they are but for where windows end
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class TrainSpeed:
    """tokens: in a step. step_s: the median step's seconds; first_s: the first's, with all that is compiled in it.
    flops: of a step, three times the forward pass's. mfu: those a second over `limits.products`. peak_memory: bytes, of the
    device's allocator over the timed steps, on a CPU of the whole process; None where that cannot be told.

    products_s and moved_s make the floor, one after the other, since nothing is updated before the norm of all gradients is
    known: the products at the rate measured, then `moved` bytes of weights, gradients and AdamW at that of copies.
    """

    tokens: int
    step_s: float
    first_s: float
    flops: int
    limits: Limits
    peak_memory: int | None
    moved: int
    kernels: Sequence[Kernel]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s

    @property
    def mfu(self) -> float:
        return self.flops / self.step_s / self.limits.products

    @property
    def products_s(self) -> float:
        return self.flops / self.limits.products

    @property
    def moved_s(self) -> float:
        return self.moved / self.limits.copies

    @property
    def floor_s(self) -> float:
        return self.products_s + self.moved_s


def train_speed(
    design: ModelConfig,
    *,
    batch: int = 4,
    length: int = 4096,
    precision: str | None = None,
    compile: bool = False,
    packed: bool = False,
    activation_checkpointing: Choice = False,
    steps: int = 10,
    device: str = "auto",
) -> TrainSpeed:
    """Time `steps` steps of `batch` rows of `length` tokens, after WARM_UP others.

    precision: float32 or bfloat16 (autocast), by itself what the device is quick in. packed: documents of random lengths
    (lognormal, 600 tokens on average) end to end instead of whole rows. activation_checkpointing: as in a run.

    Raises ValueError for what is not known or does not fit, with what would.
    """
    batch, length, steps = (
        whole_number(name, value, 1) for name, value in (("batch", batch), ("length", length), ("steps", steps))
    )
    place = find_device(device)
    precision = known_precision(precision, place)
    check_tokens(design)
    check_kept(design, place)
    can = limits(place, getattr(torch, precision))
    run = RunConfig(
        design=design,
        data={"length": length},
        batch=batch,
        steps=WARM_UP + steps + PROFILED,
        warmup=0,
        precision=precision,
        compile=compile,
        activation_checkpointing=activation_checkpointing,
        device=str(place),
    )
    try:
        return timed(run, design, RandomText(design.vocab, batch, length, packed), can)
    except (RuntimeError, MemoryError) as error:
        if not no_memory(error):
            raise
    release()
    raise ValueError(what_fits(run, design, packed))


def known_precision(name: str | None, device: torch.device) -> str:
    """A precision that models are trained and run in. Raises ValueError naming the nearest."""
    if name is None:
        return "bfloat16" if fast_dtype(device) == torch.bfloat16 else "float32"
    if name not in PRECISIONS:
        raise ValueError(f"precision {name!r}; {suggest(name, PRECISIONS)}")
    return name


def check_tokens(design: ModelConfig) -> None:
    if not isinstance(design.front, Tokens) or not isinstance(design.head, Logits):
        raise ValueError("speeds are measured from tokens to tokens: this design's front or head is another")


def check_kept(design: ModelConfig, device: torch.device) -> None:
    """Raise ValueError where what training keeps between two steps is more than all memory that the device has."""
    have, count = memory(device), parameters(design)
    if have is not None and count * KEPT > have:
        raise ValueError(
            f"training {si(count)} parameters keeps {size(count * KEPT)} (float32 weights, gradients and AdamW's moments), and "
            f"{device} has {size(have)}: fewer than {si(have / KEPT)} would fit; choose a smaller dim, vocab or pattern"
        )


def what_fits(run: RunConfig, design: ModelConfig, packed: bool) -> str:
    """Smaller steps are tried, halving the rows and then their length."""
    batch, length, device = run.batch, run.data.length, find_device(run.device)

    def one_step(batch: int, length: int) -> None:
        step = Stepping(run, design, RandomText(design.vocab, batch, length, packed), 2)
        with step.batches:
            step()
            step()  # the optimizer has its moments now

    rows = largest(lambda rows: one_step(rows, length), batch)
    shorter = None if rows else largest(lambda tokens: one_step(1, tokens), length)
    have = memory(device)
    message = (
        f"a step of {batch} x {length:,} tokens does not fit in the {size(have) if have else 'memory'} of {device}"
    )
    if rows:
        return f"{message}; --batch {rows} does"
    if shorter:
        return f"{message}; --batch 1 --length {shorter} does"
    return f"{message}, and no shorter one; choose a smaller dim, vocab or pattern"


class Stepping:
    """A model in training: each call is a step."""

    def __init__(self, run: RunConfig, design: ModelConfig, text: "RandomText", steps: int):
        self.run, self.device = run, find_device(run.device)
        self.objective = NextToken(build(design, device=self.device))
        self.optimizers = Optimizers(self.objective.model, run)
        self.batches = Ahead(text, steps, 1, self.device)
        self.broken = torch.zeros((), device=self.device)
        self.done = 0
        self.objective.model.activation_checkpointing = run.activation_checkpointing
        if run.compile:
            compile_slots(self.objective.model)

    def __call__(self) -> None:
        ready = next(self.batches)
        loss, _ = backward(self.objective, ready.batch, ready.parts, self.run.precision, channels=Channels())
        norm = nn.utils.clip_grad_norm_(self.objective.model.parameters(), self.run.clip or math.inf)
        self.broken = torch.logical_not(loss.isfinite() & norm.isfinite()).float().maximum(self.broken)
        self.done += 1
        self.optimizers.step(self.done, self.broken)


def timed(run: RunConfig, design: ModelConfig, text: "RandomText", can: Limits) -> TrainSpeed:
    step = Stepping(run, design, text, run.steps)
    device, counted = step.device, run.steps - WARM_UP - PROFILED
    with step.batches:
        started = now(device)
        step()
        first = now(device) - started
        for _ in range(WARM_UP - 1):
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = intervals(step, device, counted, waiting=False)
        peak = peak_memory(device)
        seen = kernels(step, device, PROFILED)
    lengths = [length for number in range(WARM_UP, WARM_UP + counted) for length in text.lengths(number)]
    flops = 3 * forward_flops(design, lengths) // counted
    tokens = run.batch * run.data.length
    return TrainSpeed(tokens, median(times), first, flops, can, peak, moved(design, run.precision), seen)


def moved(design: ModelConfig, precision: str) -> int:
    """Bytes that a step must move for its weights alone: read forward and backward in the products' precision, gradients,
    AdamW."""
    return parameters(design) * (2 * BYTES[precision] + GRADIENT + UPDATED)


def forward_flops(design: ModelConfig, lengths: Sequence[int]) -> int:
    """Of documents of these lengths, each of whose tokens sees those before it and itself."""
    contexts = np.unique(np.linspace(1, max(lengths), GRID).round().astype(int))
    at = np.interp(np.arange(1, max(lengths) + 1), contexts, [flops_per_token(design, int(c)) for c in contexts])
    up_to = at.cumsum()
    return int(sum(up_to[length - 1] for length in lengths))


def peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
        import sys
    except ImportError:  # not on Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch of whole rows."""

    inputs: Tensor
    targets: Tensor
    cu_seqlens: None = None

    def to(self, device: torch.device | str) -> "Rows":
        return Rows(self.inputs.to(device), self.targets.to(device))


class RandomText:
    """Endless batches of random ids, as `plait.train.inputs.Batches`. Packed documents have other lengths in every batch."""

    def __init__(self, vocab: int, batch: int, length: int, packed: bool):
        self.vocab, self.batch, self.length, self.packed = vocab, batch, length, packed
        self.read = 0
        self.generator = torch.Generator().manual_seed(0)

    def __next__(self) -> Any:
        shape = (1, self.batch * self.length) if self.packed else (self.batch, self.length)
        inputs, targets = (torch.randint(self.vocab, shape, generator=self.generator, device="cpu") for _ in range(2))
        self.read += 1
        if not self.packed:
            return Rows(inputs, targets)
        cuts = torch.tensor([0, *accumulate(self.documents(self.read - 1))], dtype=torch.int32, device="cpu")
        return Batch(inputs, targets, cuts, 0)

    def documents(self, number: int) -> list[int]:
        """The lengths in a batch, none longer than `length`."""
        draw, lengths, left = random.Random(number), list[int](), self.batch * self.length
        while left:
            lengths.append(min(left, self.length, max(1, round(draw.lognormvariate(MIDDLE, 1)))))
            left -= lengths[-1]
        return lengths

    def lengths(self, number: int) -> list[int]:
        """Of the documents in a batch, counted from 0."""
        return self.documents(number) if self.packed else [self.length] * self.batch

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read = state["read"]
