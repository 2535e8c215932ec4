"""What a rule that chooses layers is given, and what it gives."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plait.convert.plan import Plan, attention_places
from plait.convert.transfer import some_text, student_of, transfer
from plait.model.language_model import LanguageModel
from plait.model.loss import KL
from plait.model.objective import Batch
from plait.model.surgery import swap
from plait.ops.instructions import fast_dtype
from plait.train.step import autocast

ROW = 512  # tokens of a row of text that a student is calibrated by, as far as the teacher's positions go
Score = Callable[[LanguageModel], float]  # higher is better; its attribute `tokens`, if any: what one call reads


@dataclass(frozen=True)
class Request:
    """What layers are scored for.

    mixer: takes an attention layer's place. keep: how many stay. student: the teacher with all its attention replaced and
    aligned; None: as the transfer leaves it, calibrated. listed: of the rule `list`. window: of the rule `window`.
    score: what the rules `recall` and `halo` measure. commonsense: what `halo` divides by. steps, rate: of the rules that
    learn, an AdamW step a batch.
    """

    mixer: Any
    keep: int
    seed: int = 0
    student: LanguageModel | None = None
    listed: tuple[str, ...] = ()
    window: int = 128
    score: Score | None = None
    commonsense: Score | None = None
    steps: int = 100
    rate: float | None = None


@dataclass
class Scores:
    """By address, higher where attention is needed more; tokens that any model read, and seconds."""

    scores: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0


Rule = Callable[[LanguageModel, Request, Sequence[Batch]], Scores]


@contextmanager
def timed(scores: Scores) -> Iterator[Scores]:
    start = time.perf_counter()
    yield scores
    scores.seconds += time.perf_counter() - start


def asked(score: Score | None, rule: str) -> Score:
    if score is None:
        raise ValueError(f"the rule {rule!r} asks for a score of a model, and none was given")
    return score


def student(teacher: LanguageModel, request: Request, data: Sequence[Batch], scores: Scores) -> LanguageModel:
    """The teacher with all attention replaced, calibrated on the first of the data where it is not given."""
    if request.student is not None:
        return request.student
    places = attention_places(teacher.design)
    plan = Plan.of(teacher, "", dict.fromkeys(places, request.mixer), seed=request.seed)
    text = some_text(data, length=min(ROW, teacher.max_positions or ROW))
    scores.tokens += 0 if text is None else text.shape[:2].numel()
    return student_of(teacher, plan, text=text)


def with_one(model: LanguageModel, other: LanguageModel, index: int) -> LanguageModel:
    """`model` with the layer of `other` at the place of this number in reading order: its very weights."""
    here, there = (m.design.places()[index] for m in (model, other))
    layer = other.design.place(there).layer  # type: ignore[union-attr]  # no parallel slot is exchanged
    changed = swap(model, {here: layer.replace(wrap=None)})
    new, own = changed.place(changed.design.places()[index]), other.place(there)
    share(new, own)
    return changed


def share(new: Any, own: Any) -> None:
    """Hold the very numbers of another layer of the same kind."""
    theirs = dict(own.named_parameters())
    for name, parameter in new.named_parameters():
        parameter.data = theirs[name].data


def windowed(teacher: LanguageModel, address: str, window: int) -> LanguageModel:
    """The teacher with one layer that sees a window, and is otherwise what it was."""
    changed = swap(teacher, {address: attention_places(teacher.design)[address].replace(window=window, wrap=None)})
    index = teacher.design.places().index(address)
    transfer(teacher.place(address), changed.place(changed.design.places()[index]))
    return changed


def divergences(
    teacher: LanguageModel, models: dict[str, LanguageModel], data: Sequence[Batch], scores: Scores
) -> dict[str, float]:
    """KL(teacher || model) in nats a scored position, of every model; the teacher runs once a batch."""
    zero = torch.zeros((), dtype=torch.float64, device=teacher.device)
    totals, count = dict.fromkeys(models, zero), 0
    with torch.no_grad(), autocast(teacher.device, precision(teacher)):
        for batch in data:
            theirs = _features(teacher, batch)
            rule = KL(theirs, teacher.head, scored=batch.targets >= 0)
            count += int(rule.count())
            for name, model in models.items():
                totals[name] = totals[name] + model.head.loss(_features(model, batch), rule).total.double()
            scores.tokens += batch.inputs.numel() * (1 + len(models))
    return {name: float(total) / max(1, count) for name, total in totals.items()}


def precision(model: LanguageModel) -> str:
    """What a rule reads text in: bfloat16 on a GPU that is fast in it. The rounding is the teacher's too, up to the layer
    that differs."""
    fast = model.device.type == "cuda" and fast_dtype(model.device) == torch.bfloat16
    return "bfloat16" if fast and model.dtype == torch.float32 else "float32"


def _features(model: LanguageModel, batch: Batch) -> Tensor:
    return model.features(batch.inputs, cu_seqlens=batch.cu_seqlens)[0]
