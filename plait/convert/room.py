"""Whether a GPU has room for a stage, counted before any work is done: what is kept between steps, and what a step holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from plait.convert.align import slots_of
from plait.convert.plan import attention_places
from plait.design import declared
from plait.design.count import parameters
from plait.design.model import ModelConfig
from plait.design.summary import si, size
from plait.design.weights import MULTIPLIED
from plait.model.loss import SLICE
from plait.train.config import RunConfig

WEIGHT = 4  # bytes: weights are float32 beside autocast
TRAINED = 12  # bytes more where one is trained: its gradient and AdamW's two moments
BYTES = {"float32": 4, "bfloat16": 2}  # of an activation
# Of what is counted of a step: gates, norms and recurrences keep numbers of their own.
MORE = 4 / 3
HEAD = 6  # copies of a slice's logits, float32: both models', and what becomes of them


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes. kept: weights, gradients and moments of the student, and the teacher's weights; step: activations that the
    backward pass reads, and what the head makes of a slice."""

    kept: int
    step: int

    @property
    def all(self) -> int:
        return self.kept + self.step


def need(teacher: ModelConfig, stage: str, run: RunConfig) -> Need:
    """What a stage needs, its student taken to be as large as its teacher: of every matrix in a slot, what it reads and gives
    is kept for the backward pass, and the stream around every slot. Of a run in parts, or one that computes activations
    again, it is what that leaves. Fitted to three steps on an H100 (tests/convert/test_room.py)."""
    count, slots = parameters(teacher), _slots(teacher)
    trained, head = count, SLICE * WEIGHT * HEAD + teacher.vocab * teacher.dim * WEIGHT
    if stage == "align":
        slots = [slots[i] for i in slots_of(teacher, attention_places(teacher))]
        trained, head = sum(weights for _, weights in slots), 0
    tokens = -(-run.batch // run.accumulate) * run.data.length
    inside = [numbers * BYTES[run.precision] for numbers, _ in slots]
    stream = 2 * teacher.dim * WEIGHT * len(slots)
    held = max(inside) if run.activation_checkpointing is True else sum(inside)
    return Need(2 * count * WEIGHT + trained * TRAINED, round(MORE * tokens * (stream + held)) + head)


def check_room(teacher: ModelConfig, runs: Mapping[str, RunConfig], free: int, device: str) -> None:
    """Raise ValueError for the first stage that `free` bytes have no room for; it says what would fit."""
    for stage, run in runs.items():
        needed = need(teacher, stage, run)
        if needed.all > free:
            raise ValueError(
                f"{stage}: a step of {run.batch} x {run.data.length:,} tokens needs about {size(needed.all)} "
                f"({size(needed.kept)} for both models and the optimizer, {size(needed.step)} for the step), and {device} has "
                f"{size(free)} free; {what_fits(teacher, stage, run, free)}"
            )


def what_fits(teacher: ModelConfig, stage: str, run: RunConfig, free: int) -> str:
    """The first change that makes room, of those that change no result before those that do."""
    for again in dict.fromkeys((run.activation_checkpointing, True)):
        parts = run.accumulate
        while parts < run.batch:
            parts = min(2 * parts, run.batch)
            if need(teacher, stage, run.replace(accumulate=parts, activation_checkpointing=again)).all <= free:
                more = (
                    f" {stage}.activation_checkpointing=true"
                    if again is True and run.activation_checkpointing is not True
                    else ""
                )
                return f"{stage}.accumulate={parts}{more} would fit, with equal results"
    one = run.replace(batch=1, accumulate=1, activation_checkpointing=True)
    for length in (run.data.length >> shift for shift in range(run.data.length.bit_length())):
        if need(teacher, stage, one.replace(data=run.data.replace(length=length))).all <= free:
            return f"{stage}.batch=1 {stage}.length={length} {stage}.activation_checkpointing=true would fit"
    return f"only a teacher of fewer than {si(free / (2 * WEIGHT + TRAINED))} parameters would fit"


def _slots(design: ModelConfig) -> list[tuple[float, int]]:
    """Of each slot, the numbers a token that its matrices read and give, and its weights."""
    found = [(0.0, 0)] * len(design.slots)
    for weight in declared.weights(design):
        if weight.name.startswith("slots."):
            at = int(weight.name.split(".")[1])
            numbers, weights = found[at]
            if weight.role in MULTIPLIED:
                numbers += sum(weight.shape[-2:]) * prod(weight.shape[:-2]) * weight.used
            found[at] = numbers, weights + prod(weight.shape)
    return found
