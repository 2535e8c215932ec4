"""A conversation whose history is the model's state: each turn reads only what it adds.

What is in the state is always a beginning of the tokens that the chat template makes of all messages, as if those had been
read from the start. The token that ends an answer, or one that the template puts there, is read with the next question.
"""

from collections.abc import Generator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from plait.data.chat_template import Message, need_template
from plait.data.tokenizer import Tokenizer
from plait.engine.decode import ROOM, check_vocab, evaluating, make_room, pool_of
from plait.engine.prefill import read_one
from plait.engine.sampling import Sampling, check_finite, not_finite
from plait.engine.step import Step
from plait.engine.text import StoppedText, stop_strings
from plait.model.language_model import LanguageModel
from plait.ops.numbers import whole_number
from plait.state import ModelState, Pool


class Chat:
    """`say(text)` gives the answer in pieces; `messages` is the conversation so far, `tokens` what the state has read of it.

    read: tokens that the last turn read; again: how many of them had been read before, because the template or the tokenizer
    writes what was there otherwise now (as templates do that drop what was thought). A state from before the last answer is
    kept, so that it is seldom more than that answer.
    Raises DataError for a tokenizer without a chat template, and ValueError for options out of range.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        max_tokens: int = 512,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stop: str | Sequence[str] = (),
    ):
        check_vocab(model, tokenizer)
        self.template, self.stops = need_template(tokenizer), stop_strings(stop)
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.max_tokens, self.system = whole_number("max_tokens", max_tokens, 1), system
        self.seed = int(torch.randint(2**62, (), device="cpu")) if sampling.seed is None else sampling.seed
        self._pool: Pool | None = None
        self._step: Step | None = None
        self.reset()

    def reset(self) -> None:
        """Begin anew; the system message stays."""
        self.messages: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.tokens: list[int] = []
        self.state: ModelState | None = None  # after `tokens`
        self._before: tuple[int, ModelState] | None = None  # how many of them there were before the last answer
        self.read = self.again = 0

    def say(self, text: str) -> Generator[str]:
        """The answer to `text`, as it comes: a piece for each token, empty where that makes no text certain.

        Whoever stops listening (`close()`) ends it there, and what came is what the model is remembered to have said. Raises
        ValueError, and leaves all as it was, where the conversation is longer than the model's positions go."""
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.tokenizer.encode(self.template.render(messages, answer=True), special=True)
        limit = self.model.max_positions
        if limit is not None and len(ids) > limit:
            raise ValueError(
                f"the conversation has {len(ids):,} tokens, and the model's positions end at {limit:,}: begin anew"
            )
        room = self.max_tokens if limit is None else min(self.max_tokens, limit - len(ids) + 1)
        return self._answer(messages, ids, room)

    def _answer(self, messages: list[Message], ids: list[int], room: int) -> Generator[str]:
        self.messages, pieces = messages, list[str]()
        text = StoppedText(self.tokenizer.stream(after=ids), self.stops)
        try:
            with evaluating(self.model), closing(self._tokens(ids, room)) as tokens:
                for token in tokens:
                    pieces.append(text.push(token))
                    yield pieces[-1]
                    if text.ended:
                        break
            if piece := text.finish():
                pieces.append(piece)
                yield piece
        finally:
            self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def _tokens(self, ids: list[int], room: int) -> Generator[int]:
        """The answer's tokens. While one is with the caller, the state is after the one before it."""
        hidden, state = self._read(ids)
        pool, step, row = self._begin(ids, state)
        self.state = None  # until all is well again: an interrupt leaves a row half written
        token = self._choose(step, pool, row, hidden)
        for count in range(room):
            if token in self.tokenizer.ends:
                break
            try:
                yield token
            except GeneratorExit:
                break
            if count + 1 < room:
                following = self._choose(step, pool, row, None)
                self.tokens.append(token)
                token = following
        self.state = pool.take([row])
        pool.leave([row])

    @torch.inference_mode()
    def _read(self, ids: list[int]) -> tuple[Tensor, ModelState]:
        """What the head reads after `ids`, and the state, from the longest beginning of them that there is a state of."""
        known, state = 0, None
        for length, kept in ((len(self.tokens), self.state), self._before or (0, None)):
            if kept is not None and known < length < len(ids) and ids[:length] == self.tokens[:length]:
                known, state = length, kept
        self.read, self.again = len(ids) - known, len(self.tokens) - known
        state = self.model.init_state(1, len(ids)) if state is None else state
        hidden, state = read_one(self.model, ids[known:], state)
        check_finite(hidden)
        self.tokens, self.state, self._before = list(ids), state, (len(ids), state)
        return hidden, state

    @torch.inference_mode()
    def _begin(self, ids: list[int], state: ModelState) -> tuple[Pool, Step, int]:
        """The pool's row with the state in it. The pool stays from turn to turn, and with it what was captured of a step."""
        longest = len(ids) + min(self.max_tokens, ROOM)
        if self._pool is None or self._step is None or not self._pool.free_rows:  # an interrupt has left a row behind
            self._pool = pool_of(self.model, 1, longest)
            self._step = Step(self.model, self._pool, [self.sampling], [self.seed], vocab=self.tokenizer.vocab)
        make_room(self._pool, longest)
        (row,) = self._pool.join(state)
        self._step.sampler.forget(row)
        self._step.sampler.hold(row, ids)
        return self._pool, self._step, row

    @torch.inference_mode()
    def _choose(self, step: Step, pool: Pool, row: int, hidden: Tensor | None) -> int:
        """The next token: from what the head reads, or after reading the last one."""
        if hidden is None:
            make_room(pool, pool.lengths[row] + 1)
        at = pool.at([row])
        token = int(step(at) if hidden is None else step.choose(hidden, at))
        if token < 0:
            raise not_finite()
        return token
