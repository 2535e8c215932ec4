"""Whether a stage fits on a GPU: in as many parts of a step as it must be, or not at all, said before anything is trained."""

from math import ceil

from plait.design.count import parameters
from plait.design.model import ModelConfig
from plait.train.config import RunConfig

GIB = 2**30
TRAINED, READ = 16, 4  # bytes a weight in float32: with its gradient and AdamW's two, or alone
# Bytes kept for the backward pass for each channel of a token in a slot, in bfloat16 under autocast. On an H100 25 GiB were
# held beside the weights for 24,576 tokens of 60 slots 576 wide (benchmarks/convert_smollm2.py): 32.
KEPT = {"bfloat16": 40, "float32": 72}
KEPT_RECOMPUTED = 8  # with activation_checkpointing
SPARE = 0.92  # of the memory: CUDA's own, and what lies between tensors


def in_parts(run: RunConfig, student: ModelConfig, teacher: ModelConfig, memory: int) -> RunConfig:
    """The run with each step cut into as many parts as `memory` bytes ask for, which changes no number but by rounding. Raises
    ValueError where not even one sequence fits, saying what would."""
    fixed = TRAINED * parameters(student) + READ * parameters(teacher)
    kept = KEPT_RECOMPUTED if run.activation_checkpointing else KEPT[run.precision]
    sequence = kept * student.dim * len(student.slots) * run.data.length
    fit = int(SPARE * memory - fixed) // sequence
    if fit < 1:
        raise ValueError(f"{_too_small(run, fixed, sequence, memory)}; {_would(run, student, fixed, memory)}")
    return run.replace(accumulate=max(run.accumulate, ceil(run.batch / fit)))


def _too_small(run: RunConfig, fixed: int, sequence: int, memory: int) -> str:
    need = (fixed + sequence) / SPARE / GIB
    return (
        f"this GPU has {memory / GIB:.1f} GiB, and training needs about {need:.1f}: {fixed / GIB:.1f} for weights and what the "
        f"optimizer keeps, {sequence / GIB:.1f} for one sequence of {run.data.length:,} tokens"
    )


def _would(run: RunConfig, student: ModelConfig, fixed: int, memory: int) -> str:
    """What would fit."""
    room = SPARE * memory - fixed
    channels = student.dim * len(student.slots)
    if room >= KEPT_RECOMPUTED * channels * run.data.length:
        return "training.activation_checkpointing=true fits"
    length = int(room // (KEPT_RECOMPUTED * channels))
    if length >= 1:
        return f"training.activation_checkpointing=true with length {length:,} fits"
    return (
        f"the weights alone need {fixed / SPARE / GIB:.1f} GiB: take a larger GPU or a smaller teacher, or device=cpu"
    )
