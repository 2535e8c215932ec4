"""Rules that exchange one layer after the other and look at what that does, without training."""

from collections.abc import Sequence

from plait.convert.plan import attention_places
from plait.convert.scores import (
    Request,
    Score,
    Scores,
    asked,
    divergences,
    student,
    timed,
    windowed,
    with_one,
)
from plait.model.language_model import LanguageModel
from plait.model.objective import Batch

BASE = ""
MOST = 50.0  # HALO's largest score, of a layer that costs no commonsense at all


def kl(teacher: LanguageModel, request: Request, data: Sequence[Batch]) -> Scores:
    """AMD's SMART (Zebra-Llama): by how much KL(teacher || all-recurrent student) falls when this layer alone is restored."""
    with timed(Scores()) as out:
        base = student(teacher, request, data, out)
        restored = {a: with_one(base, teacher, i) for a, i in places_of(teacher).items()}
        found = divergences(teacher, {BASE: base, **restored}, data, out)
        out.scores = {address: found[BASE] - found[address] for address in restored}
    return out


def window(teacher: LanguageModel, request: Request, data: Sequence[Batch]) -> Scores:
    """KL of the teacher with this layer alone narrowed to a window (hybrid-model-factory)."""
    with timed(Scores()) as out:
        models = {a: windowed(teacher, a, request.window) for a in places_of(teacher)}
        out.scores = divergences(teacher, models, data, out)
    return out


def recall(teacher: LanguageModel, request: Request, data: Sequence[Batch]) -> Scores:
    """What of `score` is lost where this layer alone is replaced; Jet-Nemotron's rule where that is retrieval."""
    score = asked(request.score, "recall")
    with timed(Scores()) as out:
        whole = _counted(score, teacher, out)
        out.scores = {
            a: whole - _counted(score, model, out) for a, model in _replaced(teacher, request, data, out).items()
        }
    return out


def halo(teacher: LanguageModel, request: Request, data: Sequence[Batch]) -> Scores:
    """HALO (arXiv 2601.22156): retrieval lost where this layer alone is replaced, for each point of commonsense lost."""
    score, other = asked(request.score, "halo"), asked(request.commonsense, "halo")
    with timed(Scores()) as out:
        models = _replaced(teacher, request, data, out)
        retrieval = {a: _counted(score, model, out) for a, model in models.items()}
        commonsense = {a: _counted(other, model, out) for a, model in models.items()}
        most, best = max(retrieval.values()), max(commonsense.values())
        out.scores = {a: min(MOST, (most - retrieval[a]) / (best - commonsense[a] + 1e-10)) for a in models}
    return out


def places_of(teacher: LanguageModel) -> dict[str, int]:
    """Attention layers by address, and the number of each among all places."""
    places = teacher.design.places()
    return {address: places.index(address) for address in attention_places(teacher.design)}


def _replaced(teacher: LanguageModel, request: Request, data: Sequence[Batch], out: Scores) -> dict[str, LanguageModel]:
    """By address, the teacher with that layer alone replaced."""
    base = student(teacher, request, data, out)
    return {a: with_one(teacher, base, i) for a, i in places_of(teacher).items()}


def _counted(score: Score, model: LanguageModel, out: Scores) -> float:
    value = float(score(model))
    out.tokens += getattr(score, "tokens", 0)
    return value
