"""What a model finds again in its context: associative recall (many facts, one is asked for) and the needle (one fact at a
given depth), by length. Each question is answered twice: the likeliest of the candidates, and what the model writes itself,
of which log-likelihoods say too little."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from plait.data import Tokenizer
from plait.engine.decode import check_vocab
from plait.evaluate.haystack import POOL, ROOM, Filler, Hidden, hide
from plait.evaluate.likelihood import Question, answers
from plait.model import LanguageModel

LENGTHS = (512, 1024, 2048)
PAIRS = (4, 16)
DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)  # percent
QUESTIONS = 20
CANDIDATES = 10  # of a needle: the true value and values that the text does not hold
WORD = re.compile(r"\s*(\w+)")


@dataclass(frozen=True, slots=True)
class Kind:
    """Questions that count together. `pairs`: facts in the text; `depth`: percent of the text before the one fact of a needle,
    None where facts lie anywhere."""

    length: int
    pairs: int
    depth: float | None = None

    @property
    def chance(self) -> float:
        """The share of choices that a model gets right which knows nothing."""
        return 1 / (self.pairs if self.depth is None else CANDIDATES)


@dataclass(frozen=True, slots=True)
class Found:
    """How many of the `questions` of a kind were answered right: `chosen` among the candidates, `written` by the model."""

    kind: Kind
    questions: int
    chosen: int
    written: int

    def as_data(self) -> dict[str, Any]:
        counts = {"questions": self.questions, "chosen": self.chosen, "written": self.written}
        return {**asdict(self.kind), "chance": self.kind.chance, **counts}


def recall_kinds(lengths: Sequence[int], pairs: Sequence[int]) -> list[Kind]:
    """Raises ValueError for fewer than two pairs, of which nothing could be chosen."""
    if few := [count for count in pairs if count < 2]:
        raise ValueError(f"pairs must be at least 2, got {few[0]}")
    return [Kind(length, count) for length in lengths for count in pairs]


def needle_kinds(lengths: Sequence[int], depths: Sequence[float]) -> list[Kind]:
    """Raises ValueError for a depth that is not from 0 to 100."""
    if wrong := [depth for depth in depths if not 0 <= depth <= 100]:
        raise ValueError(f"depths are percent of the text, from 0 to 100, got {wrong[0]}")
    return [Kind(length, 1, depth) for length in lengths for depth in depths]


def fitting(model: LanguageModel, lengths: Sequence[int]) -> tuple[int, ...]:
    """The lengths that a model's positions have room for."""
    return tuple(n for n in lengths if model.max_positions is None or n <= model.max_positions)


def questions_of(kind: Kind, tokenizer: Tokenizer, filler: Filler, count: int, seed: int) -> Iterator[Hidden]:
    """Equal seeds give equal questions, whatever other kinds are asked for."""
    random = Random(f"{seed} {kind.length} {kind.pairs} {kind.depth}")
    for _ in range(count):
        if kind.depth is None:
            places, others = [random.random() for _ in range(kind.pairs)], 0
        else:
            places, others = [kind.depth / 100], CANDIDATES - 1
        yield hide(tokenizer, filler, random, length=kind.length, places=places, others=others)


def measure(
    model: LanguageModel,
    tokenizer: Tokenizer,
    kinds: Sequence[Kind],
    *,
    text: str = "stdlib",
    questions: int = QUESTIONS,
    seed: int = 0,
    write: bool = True,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Found]:
    """`questions` of each kind, with filler from `text`, a source as `data.source` names it. `progress` is told how many of all
    questions are answered. Without `write` the model chooses only, which is sooner done, and `written` is 0. Raises ValueError
    where a kind's facts do not fit, the text is too short, or the model's positions are."""
    check_vocab(model, tokenizer)
    if questions < 1:
        raise ValueError(f"questions must be at least 1, got {questions}")
    for kind in kinds:
        if model.max_positions is not None and kind.length > model.max_positions:
            raise ValueError(
                f"length {kind.length:,} is longer than the model's positions go (max_positions {model.max_positions:,})"
            )
    filler = Filler(tokenizer, text, POOL * max((kind.length for kind in kinds), default=0))
    found, total = [], questions * len(kinds)
    for kind in kinds:
        asked = list(questions_of(kind, tokenizer, filler, questions, seed))
        done = len(found) * questions
        found.append(_ask(model, tokenizer, kind, asked, write, lambda count, done=done: progress(done + count, total)))
    return found


def _ask(
    model: LanguageModel,
    tokenizer: Tokenizer,
    kind: Kind,
    asked: Sequence[Hidden],
    write: bool,
    progress: Callable[[int], object],
) -> Found:
    questions = [Question(hidden.context, hidden.choices, f"length {kind.length:,}") for hidden in asked]
    chosen = written = 0
    answered = answers(model, questions, write=ROOM if write else 0, vocab=tokenizer.vocab)
    for done, (hidden, answer) in enumerate(zip(asked, answered, strict=True), start=1):
        scores = [score.loglikelihood for score in answer.scores]
        chosen += scores.index(max(scores)) == hidden.right
        word = WORD.match(tokenizer.decode(answer.written))
        written += word is not None and word[1] == hidden.values[hidden.right]
        progress(done)
    return Found(kind, len(asked), chosen, written)
