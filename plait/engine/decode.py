"""The token loop: all rows advance together, and each leaves when it is done."""

from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.data.tokenizer import Tokenizer
from plait.design.ends import Logits, Tokens
from plait.engine.prefill import prefill
from plait.engine.sampling import Sampling, check_finite, not_finite
from plait.engine.step import Step
from plait.model.language_model import LanguageModel
from plait.ops.numbers import whole_number
from plait.state import Pool, PoolRows

ROOM = 4096  # tokens a row is given room for at the start; more grow the pool
PAGE = 256  # tokens in a page on a GPU; elsewhere a row has one page, which attention reads without looking for it


@dataclass(frozen=True)
class Launched:
    """The next tokens of these prompts, on their way to the host. `event`: their arrival; None: they were made there."""

    prompts: tuple[int, ...]
    tokens: Tensor
    event: Any = None

    @classmethod
    def of(cls, prompts: Iterable[int], tokens: Tensor) -> "Launched":
        if not tokens.is_cuda:
            return cls(tuple(prompts), tokens)
        here = torch.empty(tokens.shape, dtype=tokens.dtype, device="cpu", pin_memory=True).copy_(
            tokens, non_blocking=True
        )
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tokens.device))
        return cls(tuple(prompts), here, event)

    def read(self) -> dict[int, int]:
        if self.event is not None:
            self.event.synchronize()
        return dict(zip(self.prompts, self.tokens.tolist(), strict=True))


class Decoding:
    """Prompts being continued on a pool. `step` gives every live row its next token, `leave` ends rows.

    On a GPU a step is launched before the tokens of the last one are read, so that the device does not wait for the host; what
    it chooses for a row that has left meanwhile is dropped. `vocab` limits the choice to the first ids, where the model has
    more than the tokenizer.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        vocab: int | None = None,
    ):
        max_tokens = check(model, prompts, max_tokens)
        prompts = [list(map(int, prompt)) for prompt in prompts]
        with torch.inference_mode():
            hidden, state = prefill(model, prompts, 0)
            check_finite(hidden)
            longest = max(map(len, prompts)) + min(max_tokens, ROOM)
            self.pool = pool_of(model, len(prompts), longest)
            self._places = dict(enumerate(self.pool.join(state)))  # where each prompt's row is
            seed = int(torch.randint(2**62, (), device="cpu")) if sampling.seed is None else sampling.seed
            seeds = [seed + row for row in range(len(prompts))]
            self._step = Step(model, self.pool, [sampling] * len(prompts), seeds, vocab=vocab)
            for row, prompt in enumerate(prompts):
                self._step.sampler.hold(row, prompt)
            self._ahead = runs_ahead(model.device)
            self._left = max_tokens - 1  # steps that may still be launched
            self._launched: Launched | None = Launched.of(self._places, self._step.choose(hidden, self._at()))

    @property
    def rows(self) -> list[int]:
        """The prompts that are still being continued, by their places."""
        return list(self._places)

    def _at(self) -> PoolRows:
        return self.pool.at(list(self._places.values()))

    @torch.inference_mode()
    def step(self) -> list[int]:
        """The next token of each live row, in the order of `rows`."""
        launched = self._launched or self._launch()
        self._launched = self._launch() if self._ahead and self._left > 0 else None
        tokens = launched.read()
        chosen = [tokens[row] for row in self._places]
        if min(chosen) < 0:
            raise not_finite()
        return chosen

    def _launch(self) -> Launched:
        self._left -= 1
        make_room(self.pool, max(self.pool.lengths) + 1)
        return Launched.of(self._places, self._step(self._at()))

    @torch.inference_mode()
    def leave(self, done: Collection[int]) -> None:
        """Take rows, named by their prompts' places, out of the batch; their room is free again."""
        gone = [row for row in self._places if row in done]
        if not gone:
            return
        self.pool.leave([self._places.pop(row) for row in gone])
        if self.pool.device.type != "cuda":
            self._close_up()

    def _close_up(self) -> None:
        """Live rows side by side from the first place on, where they can be read without being gathered."""
        for row in sorted(self._places, key=self._places.__getitem__, reverse=True):
            place = self._places[row]
            if place < len(self._places):
                return
            state = self.pool.take([place])
            self.pool.leave([place])
            (self._places[row],) = self.pool.join(state)
            self._step.move(place, self._places[row])
        self._places = dict(sorted(self._places.items()))


def pool_of(model: LanguageModel, rows: int, tokens: int) -> Pool:
    """Room for so many rows of so many tokens, to be written to."""
    return model.init_pool(rows, tokens, page=PAGE if model.device.type == "cuda" else None)


def make_room(pool: Pool, longest: int) -> None:
    """For a row of so many tokens; twice as many where there is none, so that it is seldom asked for."""
    if longest > pool.tokens:
        pool.grow(2 * longest)


def runs_ahead(device: torch.device) -> bool:
    """Whether steps are launched before the tokens of the last one are read."""
    return device.type == "cuda"


def generate_tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 256,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    eos: int | None = None,
) -> list[list[int]]:
    """Continue prompts of token ids, of any lengths, by up to `max_tokens` ids; `eos` ends a row and is left out."""
    output: list[list[int]] = [[] for _ in prompts]
    ends = () if eos is None else (eos,)
    for row, token in continuations(model, prompts, max_tokens=max_tokens, sampling=sampling, ends=ends):
        output[row].append(token)
    return output


def continuations(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    ends: Collection[int] = (),
    vocab: int | None = None,
    done: set[int] | None = None,
) -> Generator[tuple[int, int]]:
    """(row, token) as they come; one of `ends` ends its row and is left out. Rows that the caller adds to `done` meanwhile are
    taken out before the next step."""
    if not len(prompts):
        return
    done = set() if done is None else done
    with evaluating(model):
        decoding = Decoding(model, prompts, max_tokens=max_tokens, sampling=sampling, vocab=vocab)
        for _ in range(int(max_tokens)):
            for row, token in zip(decoding.rows, decoding.step(), strict=True):
                if token in ends:
                    done.add(row)
                else:
                    yield row, token
            decoding.leave(done)
            if not decoding.rows:
                return


def check_vocab(model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Raise ValueError for a tokenizer with more ids than the model, TypeError for what is no model or no tokenizer."""
    if not hasattr(model, "design"):
        raise TypeError(f"expected a model that plait.build or plait.load gave, got {type(model).__name__}")
    if not hasattr(tokenizer, "vocab"):
        raise TypeError(f"expected a tokenizer that plait.load_tokenizer gave, got {type(tokenizer).__name__}")
    if tokenizer.vocab > model.design.vocab:
        raise ValueError(
            f"the tokenizer ({tokenizer.name}) has {tokenizer.vocab} ids, but the model was built for "
            f"{model.design.vocab}; use the tokenizer that the model was trained with"
        )


def check(model: LanguageModel, prompts: Sequence[Sequence[int]], max_tokens: int) -> int:
    """`max_tokens` as an int. Raises ValueError for what cannot be continued."""
    max_tokens, front, head = whole_number("max_tokens", max_tokens, 1), model.design.front, model.design.head
    if not (isinstance(front, Tokens) and isinstance(head, Logits)):
        ends = f"{type(front).__name__} to {type(head).__name__}"
        raise ValueError(f"a text is continued by a model from Tokens to Logits; this one goes from {ends}")
    for row, prompt in enumerate(prompts):
        name = "the prompt" if len(prompts) == 1 else f"prompt {row}"
        if not isinstance(prompt, Iterable) or isinstance(prompt, str):
            raise ValueError(f"{name} must be a sequence of token ids, as in [[1, 2]]; got {prompt!r}")
        if not len(prompt):
            raise ValueError(f"{name} is empty: expected at least one token to continue from")
        for (
            token
        ) in prompt:  # here and not on the model's device, where an id too large would end the process's use of it
            if whole_number(f"{name}: a token id", token, 0) >= model.design.vocab:
                raise ValueError(f"{name}: token id {token} is outside the model's vocabulary of {model.design.vocab}")
        last = len(prompt) + max_tokens - 1  # the last new token is not read
        if model.max_positions is not None and last > model.max_positions:
            left = model.max_positions - len(prompt) + 1
            hint = f"give max_tokens={left} or fewer" if left > 0 else "shorten it"
            raise ValueError(
                f"{name} of {len(prompt)} tokens with max_tokens={max_tokens} is longer than this model's positions "
                f"go (max_positions {model.max_positions}); {hint}"
            )
    return max_tokens


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """The model in evaluation mode inside the block, and as it was after it."""
    was = model.training
    if was:
        model.eval()
    try:
        yield
    finally:
        if was:
            model.train()
