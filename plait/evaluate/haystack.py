"""Facts hidden in running text, and a question about one of them, of exactly as many tokens as asked for.

A fact is "The code of KEY is VALUE." on a line of its own; the question is the same sentence up to the value. Keys are
made-up words and values numbers of four digits, so that nothing but the text says which value is a key's. Text, question
and `ROOM` tokens for the answer are together `length` tokens; what does not fit is an error, never cut off.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from random import Random

import numpy as np
from numpy.typing import NDArray

from plait.data import Tokenizer, open_source
from plait.data.corpus import texts

SYLLABLES = [a + b for a in "bdfghjklmnprstvz" for b in "aeiou"]
VALUES = range(1000, 10_000)
ROOM = 8  # tokens that an answer may have: a space and four digits, and one more that shows where it ends
POOL = 8  # texts of the greatest length that filler is taken from


@dataclass(frozen=True, slots=True)
class Hidden:
    """A question: `context` ids, the candidate `values`, their ids after the context, and the place of the true one."""

    context: list[int]
    values: list[str]
    choices: list[list[int]]
    right: int


class Filler:
    """Running text as token ids. `starts`: where words begin, which is where it may be cut."""

    def __init__(self, tokenizer: Tokenizer, source: str, tokens: int):
        """At most about `tokens` of a source, as `data.source` names it. Raises ValueError where it has no text."""
        self.source, parts, count = source, list[list[int]](), 0
        for piece in texts(open_source(source)):
            parts.append(tokenizer.encode(piece))
            count += len(parts[-1])
            if count >= tokens:
                break
        self.ids: list[int] = list(chain.from_iterable(parts))[:tokens]
        spaced = {token for token in set(self.ids) if tokenizer.decode([token])[:1].isspace()}
        self.starts: NDArray[np.int64] = np.array([0, *(i for i, token in enumerate(self.ids) if token in spaced)])

    def run(self, random: Random, tokens: int) -> tuple[list[int], NDArray[np.int64]]:
        """So many tokens from a random place, and where words begin in them. Raises ValueError where there are fewer."""
        if len(self.ids) < tokens:
            raise ValueError(
                f"{self.source}: {len(self.ids):,} tokens of text, and {tokens:,} are needed between the facts: give a "
                "longer --text or smaller --lengths"
            )
        last = len(self.ids) - tokens
        start = int(self.starts[random.randrange(int(np.searchsorted(self.starts, last, side="right")))])
        inside = self.starts[(self.starts >= start) & (self.starts <= start + tokens)] - start
        return self.ids[start : start + tokens], inside


def hide(
    tokenizer: Tokenizer,
    filler: Filler,
    random: Random,
    *,
    length: int,
    places: Sequence[float],
    others: int = 0,
) -> Hidden:
    """A question of `length` tokens with a fact at each of `places`, from 0, the beginning of the text, to 1, its end. The
    candidates are the values of all facts, and so many `others` that the text does not hold."""
    keys = _keys(random, len(places))
    values = [str(value) for value in random.sample(VALUES, len(places) + others)]
    asked = random.randrange(len(places))
    right, held = values[asked], list(zip(keys, values, strict=False))
    random.shuffle(values)
    question = f"\nThe code of {keys[asked]} is"
    end = tokenizer.encode(question)
    choices = [continuation(tokenizer, question, f" {value}") for value in values]
    facts = [tokenizer.encode(f"\nThe code of {key} is {value}.\n") for key, value in held]
    left = length - sum(map(len, facts)) - len(end) - ROOM
    if left < 0:
        raise ValueError(
            f"length {length:,}: {len(places)} {'fact' if len(places) == 1 else 'facts'}, the question and {ROOM} tokens for "
            f"the answer take {length - left:,} tokens with the tokenizer ({tokenizer.name})"
        )
    text, starts = filler.run(random, left)
    return Hidden([*_insert(text, starts, facts, places), *end], values, choices, values.index(right))


def continuation(tokenizer: Tokenizer, context: str, text: str) -> list[int]:
    """The ids that `text` adds to those of `context`, as lm-eval counts them."""
    return tokenizer.encode(context + text)[len(tokenizer.encode(context)) :]


def _keys(random: Random, count: int) -> list[str]:
    """Different words of three syllables."""
    numbers = random.sample(range(len(SYLLABLES) ** 3), count)
    size = len(SYLLABLES)
    return [SYLLABLES[n % size] + SYLLABLES[n // size % size] + SYLLABLES[n // size**2] for n in numbers]


def _insert(text: list[int], starts: NDArray[np.int64], facts: list[list[int]], places: Sequence[float]) -> list[int]:
    """The text with the facts put in at the word nearest to each place."""
    wanted = [place * len(text) for place in places]
    cuts = [0 if not len(starts) else int(starts[np.abs(starts - place).argmin()]) for place in wanted]
    cuts = [len(text) if place == 1 else cut for place, cut in zip(places, cuts, strict=True)]
    order = sorted(range(len(facts)), key=lambda i: (cuts[i], i))
    edges = [0, *(cuts[i] for i in order), len(text)]
    runs = [text[a:b] for a, b in pairwise(edges)]
    return [*chain.from_iterable((*run, *facts[i]) for run, i in zip(runs, order, strict=False)), *runs[-1]]
