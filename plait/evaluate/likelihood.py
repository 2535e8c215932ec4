"""How likely given continuations of a context are, and what the model itself writes after it.

A context is read once, through the model's state and a chunk at a time, whatever number of continuations it has: logits exist
only where something is scored, and a recurrent model's memory does not grow with the text.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from plait.design.count import state_bytes
from plait.engine.decode import evaluating
from plait.engine.prefill import CHUNK, advance, prefill
from plait.engine.sampling import check_finite
from plait.model import LanguageModel
from plait.model.loss import SLICE
from plait.state import ModelState

TOKENS = CHUNK  # of contexts whose states are held at once; a longer one is alone
ON_GPU = 8  # there, where few rows are slow, it is states of as many bytes as one part in 8 of what is free

Ids = Sequence[int]
T = TypeVar("T")


class Question(NamedTuple):
    """Token ids: a context, and what may follow it. `name`: what errors call it."""

    context: Ids
    choices: Sequence[Ids]
    name: str = "a question"


class Scored(NamedTuple):
    """Of one continuation: the sum of ln p over its tokens, and whether each of them is the likeliest where it stands."""

    loglikelihood: float
    greedy: bool


class Answer(NamedTuple):
    """Of one question: its choices scored, and the ids that the model wrote, always the likeliest next."""

    scores: list[Scored]
    written: list[int]


def answers(
    model: LanguageModel,
    questions: Iterable[Question],
    *,
    write: int = 0,
    vocab: int | None = None,
    rows: int | None = None,
) -> Iterator[Answer]:
    """An answer to each question, in order.

    write: tokens that the model writes after each context, among the first `vocab` ids (all: None); rows: how many
    contexts are read at once (None: as many as together have `TOKENS` tokens, on a GPU as many as `held` says).
    Raises ValueError naming a question that is longer than the model's positions go, or has nothing to score.
    """
    checked = (_checked(model, question, write) for question in questions)
    size, most = (lambda _: 1, rows) if rows is not None else held(model)
    for group in _runs(checked, lambda question: size(len(question.context)), most):
        with evaluating(model), torch.inference_mode():
            found = _answer(model, group, write, vocab)
        yield from found


def loglikelihoods(
    model: LanguageModel, pairs: Iterable[tuple[Ids, Ids, str]], rows: int | None = None
) -> Iterator[Scored]:
    """Of (context, continuation, name) each, in order. Neighbours with equal contexts share one reading of it."""

    def questions() -> Iterator[Question]:
        for context, same in groupby(pairs, key=lambda pair: tuple(pair[0])):
            _, choices, names = zip(*same, strict=True)
            yield Question(context, choices, names[0])

    for answer in answers(model, questions(), rows=rows):
        yield from answer.scores


def _checked(model: LanguageModel, question: Question, write: int) -> Question:
    context, choices, name = question
    if not context or not all(choices):
        raise ValueError(f"{name}: {'a continuation' if context else 'the context'} has no tokens")
    last = len(context) + max([write, *map(len, choices)]) - 1  # the last token of an answer is not read
    if model.max_positions is not None and last > model.max_positions:
        raise ValueError(
            f"{name}: {last:,} tokens are longer than the model's positions go (max_positions {model.max_positions:,})"
        )
    return question


def held(model: LanguageModel) -> tuple[Callable[[int], int], int]:
    """What the state of a context of so many tokens counts as, and how much may be held at once."""
    if model.device.type != "cuda":
        return (lambda tokens: tokens), TOKENS
    dtype = str(model.dtype).removeprefix("torch.")
    free, _ = torch.cuda.mem_get_info(model.device)
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return cache(lambda tokens: state_bytes(model.design, tokens, dtype)), (free + unused) // ON_GPU


def _runs(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Neighbours that together have at most the size `most`, or one item."""
    run, used = list[T](), 0
    for item in items:
        own = size(item)
        if run and used + own > most:
            yield run
            run, used = [], 0
        run.append(item)
        used += own
    if run:
        yield run


def _answer(model: LanguageModel, group: list[Question], write: int, vocab: int | None) -> list[Answer]:
    longest = max([write, *(len(choice) for question in group for choice in question.choices)])
    hidden, state = prefill(model, [question.context for question in group], longest)
    check_finite(hidden)
    scores = _score(model, group, hidden, state)
    written = _write(model, hidden, state, write, vocab) if write else [[] for _ in group]
    return [Answer(*found) for found in zip(scores, written, strict=True)]


def _score(
    model: LanguageModel, group: list[Question], hidden: Float[Tensor, "b d"], state: ModelState
) -> list[list[Scored]]:
    """First tokens from what the head reads after the contexts, later ones after reading those before them."""
    pairs = [(row, choice) for row, question in enumerate(group) for choice in question.choices]
    if not pairs:
        return [[] for _ in group]
    firsts = _compare(model, hidden[[row for row, _ in pairs]], [choice[0] for _, choice in pairs])
    total, greedy = (part.tolist() for part in firsts)
    later = [i for i, (_, choice) in enumerate(pairs) if len(choice) > 1]
    size, most = held(model)

    def read(i: int) -> int:
        row, choice = pairs[i]
        return size(len(group[row].context) + len(choice))

    for some in _runs(later, read, most):
        choices = [pairs[i][1] for i in some]
        ln_p, likeliest = _follow(model, choices, state.select([pairs[i][0] for i in some]))
        cuts = accumulate((len(choice) - 1 for choice in choices), initial=0)
        for i, (start, end) in zip(some, pairwise(cuts), strict=True):
            total[i] += ln_p[start:end].sum().item()
            greedy[i] = greedy[i] and bool(likeliest[start:end].all())
    scored = iter(map(Scored, total, greedy))
    return [[next(scored) for _ in question.choices] for question in group]


def _follow(
    model: LanguageModel, choices: list[Ids], state: ModelState
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """As `_compare`, of each choice's tokens but the first, end to end, each choice going on from its own row of the state. A
    choice alone may be long, and is read a chunk at a time."""
    if len(choices) > 1:
        rows = [choice[:-1] for choice in choices]
        cuts = torch.tensor([0, *accumulate(map(len, rows))], dtype=torch.int32, device="cpu")
        tokens = torch.tensor([[token for row in rows for token in row]], device=model.device)
        hidden, _ = advance(model, tokens, state, cuts)
        return _compare(model, hidden[0], [token for choice in choices for token in choice[1:]])
    found, choice = [], choices[0]
    for start in range(0, len(choice) - 1, CHUNK):
        end = min(start + CHUNK, len(choice) - 1)
        hidden, state = advance(model, torch.tensor([choice[start:end]], device=model.device), state)
        found.append(_compare(model, hidden[0], choice[start + 1 : end + 1]))
    ln_p, likeliest = zip(*found, strict=True)
    return torch.cat(ln_p), torch.cat(likeliest)


def _compare(
    model: LanguageModel, hidden: Float[Tensor, "n d"], tokens: Ids
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """ln p of each token in float64, and whether it is the likeliest, a slice of the logits at a time."""
    targets: Int[Tensor, " n"] = torch.tensor(tokens, device=hidden.device)
    step, found = max(1, SLICE // model.head.outputs), []
    for features, target in zip(hidden.split(step), targets.split(step), strict=True):
        logits = model.head(features)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        ln_p = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        found.append((ln_p.double(), logits.argmax(-1) == target))
    ln_p, likeliest = (torch.cat(part).cpu() for part in zip(*found, strict=True))
    return ln_p, likeliest


def _write(
    model: LanguageModel, hidden: Float[Tensor, "b d"], state: ModelState, count: int, vocab: int | None
) -> list[list[int]]:
    written = []
    for step in range(count):
        written.append(model.head(hidden)[:, :vocab].argmax(-1, keepdim=True))
        if step + 1 < count:
            features, state = advance(model, written[-1], state)
            hidden = features[:, -1]
    return torch.cat(written, 1).tolist()
