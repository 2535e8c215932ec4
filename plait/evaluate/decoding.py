"""Decoding on a pool, timed: a step from tokens to tokens, one captured graph on a GPU, beside what it must read."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from plait.design import ModelConfig
from plait.design.count import state_bytes, weights_read
from plait.design.summary import size
from plait.engine.decode import PAGE, check, evaluating
from plait.engine.prefill import prefill
from plait.engine.sampling import Sampling
from plait.engine.step import Step
from plait.evaluate.clock import intervals, now
from plait.evaluate.limits import Limits
from plait.evaluate.room import largest, no_memory, release
from plait.model import LanguageModel
from plait.model.device import memory
from plait.state import ModelState, PoolRows

WARM_UP = 4  # steps before those that count; the first is captured on a GPU


@dataclass(frozen=True, slots=True)
class DecodeSpeed:
    """A step of `batch` sequences that have `context` tokens behind them: its median milliseconds and the slowest's, and the
    first's seconds, with its capture on a GPU (`captured`).

    weights_bytes, state_bytes: read in a step, each once, the state of all sequences. limits: of the device.
    """

    batch: int
    context: int
    ms: float
    worst_ms: float
    first_s: float
    captured: bool
    weights_bytes: int
    state_bytes: int
    limits: Limits

    @property
    def tokens_per_s(self) -> float:
        return 1e3 * self.batch / self.ms

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return 1e3 * (self.weights_bytes + self.state_bytes) / self.ms

    @property
    def share(self) -> float:
        """Of the rate at which the device copies."""
        return self.bandwidth / self.limits.copies

    @property
    def floor_ms(self) -> float:
        return 1e3 * (self.weights_bytes + self.state_bytes) / self.limits.copies


@torch.inference_mode()
def decode_speeds(
    model: LanguageModel, contexts: Sequence[int], batches: Sequence[int], can: Limits, *, steps: int = 32
) -> list[DecodeSpeed]:
    """One for each batch and context, by `steps` greedy steps each. Raises ValueError for what does not fit."""
    cases = [(batch, context) for batch in batches for context in contexts]
    for batch, context in cases:
        check_state(model, batch, context, steps + WARM_UP)
    with evaluating(model):
        return [decode_speed(model, batch, context, can, steps) for batch, context in cases]


def decode_speed(model: LanguageModel, batch: int, context: int, can: Limits, steps: int) -> DecodeSpeed:
    try:
        return timed(model, batch, context, can, steps)
    except (RuntimeError, MemoryError) as error:
        if not no_memory(error):
            raise
    release()
    fits = largest(lambda rows: timed(model, rows, context, can, 1), batch)
    less = None if fits else largest(lambda tokens: timed(model, 1, tokens, can, 1), context)
    what = f"; --batch {fits} does" if fits else f"; --batch 1 --context {less} does" if less else ""
    raise ValueError(f"{batch} x {context:,} tokens do not fit on {model.device} beside the weights{what}")


def timed(model: LanguageModel, batch: int, context: int, can: Limits, steps: int) -> DecodeSpeed:
    step, at = stepping(model, remembering(model, batch, context, steps + WARM_UP), context + steps + WARM_UP)
    started = now(model.device)
    step(at)
    first = now(model.device) - started
    times = intervals(lambda: step(at), model.device, WARM_UP - 1 + steps, waiting=True)[WARM_UP - 1 :]
    dtype = name_of(model.dtype)
    weights, state = weights_read(model.design, batch, dtype), batch * state_bytes(model.design, context, dtype)
    captured = bool(step.captured)
    return DecodeSpeed(batch, context, 1e3 * median(times), 1e3 * max(times), first, captured, weights, state, can)


def remembering(model: LanguageModel, batch: int, context: int, more: int = 1) -> ModelState:
    """What `batch` sequences remember after `context` random tokens each. Raises ValueError where `more` could not follow."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.design.vocab, (batch, context), generator=generator, device="cpu").tolist()
    check(model, prompts, more)
    return prefill(model, prompts, 0)[1]


def stepping(
    model: LanguageModel,
    state: ModelState,
    tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
) -> tuple[Step, PoolRows]:
    """A step of a pool that holds `state`, with room for `tokens` tokens a row, and the rows that it is for."""
    pool = model.init_pool(state.batch, tokens, page=PAGE if model.device.type == "cuda" else None)
    rows = pool.join(state)
    return Step(model, pool, [sampling] * len(rows), range(len(rows))), pool.at(rows)


def check_state(model: LanguageModel, batch: int, context: int, more: int) -> None:
    """Raise ValueError where weights alone and states, of `context` tokens and `more`, are beyond all memory of the device."""
    design, dtype, have = model.design, name_of(model.dtype), memory(model.device)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    each = state_bytes(design, context + more, dtype)
    if have is None or weights + batch * each <= have:
        return
    rows = (have - weights) // each
    less = 0 if rows > 0 else longest(design, dtype, have - weights, more)
    fits = (
        f"--batch {rows} would fit" if rows > 0 else f"--batch 1 --context {less} would" if less else "no context fits"
    )
    raise ValueError(
        f"{batch} x {context:,} tokens are {size(batch * each)} of state, and beside {size(weights)} of weights that is more "
        f"than the {size(have)} of {model.device}; {fits}"
    )


def longest(design: ModelConfig, dtype: str, room: int, more: int) -> int:
    """The longest power of two of tokens whose state, with `more` after them, fits into so many bytes, where longer ones' do
    not; 0 where none does."""
    context = 1
    while state_bytes(design, context + more, dtype) <= room:
        context *= 2
    return context // 2


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
