"""Requests that are continued together: each joins when there is a row for it, and leaves when it is done.

All of it happens in the thread that calls `run`; other threads only `submit` and `cancel`. A request's tokens are what they
would be alone. Prompts are read a piece at a time between steps, so that a long one does not hold up those being written.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plait.engine.decode import ROOM, check, evaluating, make_room, pool_of
from plait.engine.prefill import advance, at_once
from plait.engine.sampling import Sampling, check_finite, not_finite
from plait.engine.step import Step
from plait.model.language_model import LanguageModel
from plait.ops.numbers import whole_number
from plait.state import ModelState


@dataclass(eq=False)
class Request:
    """A prompt to be continued. `tell` is called from the batch's thread: with each token, at the end with None, or with what
    went wrong; one of `ends` ends it and is not told."""

    ids: list[int]
    max_tokens: int
    tell: Callable[[int | None | Exception], None]
    sampling: Sampling = Sampling()  # noqa: RUF009 (frozen)
    seed: int = 0
    ends: Collection[int] = ()
    tokens: list[int] = field(default_factory=list)
    known: int = 0  # tokens of the prompt that an earlier request's state had read
    cancelled: bool = False


class Closed(RuntimeError):
    """The batch takes no more requests."""


class Batch:
    """rows: requests that are written at a time; others wait. length: tokens of a prompt and its continuation, at most; None:
    as many as the model's positions. keep: states to keep, the last ones used; a prompt that begins as one goes on from it.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        rows: int = 8,
        length: int | None = None,
        keep: int = 4,
        vocab: int | None = None,
    ):
        self.model = model
        rows, self.keep = whole_number("rows", rows, 1), whole_number("keep", keep, 0)
        limits = [n for n in (length and whole_number("length", length, 2), model.max_positions) if n]
        self.length = min(limits, default=None)
        self.waiting: deque[Request] = deque()
        self.live: dict[int, Request] = {}
        self.requests = self.written = 0
        self._reading: tuple[Request, Iterator[None]] | None = None
        self._kept = OrderedDict[tuple[int, ...], tuple[ModelState, Tensor | None]]()  # and what the head reads then
        self._asked, self._closed = threading.Condition(), False
        with torch.inference_mode():
            self.pool = pool_of(model, rows, min(self.length or ROOM, ROOM))
            self._step = Step(model, self.pool, [Sampling()] * rows, [0] * rows, vocab=vocab)

    # --- of other threads

    def check(self, ids: list[int], max_tokens: int) -> None:
        """Raise ValueError for what cannot be continued."""
        check(self.model, [ids], max_tokens)
        if self.length is not None and len(ids) + max_tokens > self.length:
            raise ValueError(
                f"the prompt has {len(ids):,} tokens, and with max_tokens={max_tokens:,} it would have more than the "
                f"{self.length:,} that there is room for"
            )

    def submit(self, request: Request) -> None:
        """Raises ValueError for what cannot be continued, Closed after `close`."""
        self.check(request.ids, request.max_tokens)
        with self._asked:
            if self._closed:
                raise Closed("the server is being stopped")
            self.waiting.append(request)
            self._asked.notify()

    def cancel(self, request: Request) -> None:
        """Nobody waits for it any more; it is told nothing from here on."""
        request.cancelled = True
        with self._asked:
            self._asked.notify()

    def close(self) -> None:
        """`run` ends after the step that is being done; whoever still waits is told."""
        with self._asked:
            self._closed = True
            self._asked.notify()

    # --- of the batch's thread

    def run(self) -> None:
        try:
            with evaluating(self.model):
                while self._has_work():
                    self.turn()
        finally:  # whatever ended it, nobody is left waiting
            self.close()
            self._end_all(Closed("the server was stopped"))

    def _has_work(self) -> bool:
        """Waits for some; False after `close`."""
        with self._asked:
            self._asked.wait_for(lambda: self._closed or self.waiting or self.live or self._reading)
            return not self._closed

    @torch.inference_mode()
    def turn(self) -> None:
        """A piece of a prompt read, and a token more for every live row."""
        try:
            self._drop_cancelled()
            self._read_on()
            if self.live:
                self._write()
        except RuntimeError as error:  # no memory, most of all: whoever is there gives way
            self._end_all(error)

    def _drop_cancelled(self) -> None:
        for row in [row for row, request in self.live.items() if request.cancelled]:
            self._leave(row)
        if self._reading is not None and self._reading[0].cancelled:
            self._reading = None

    def _read_on(self) -> None:
        if self._reading is None and self.waiting and self.pool.free_rows:
            request = self.waiting.popleft()
            self._reading = None if request.cancelled else (request, self._read(request))
        if self._reading is None:
            return
        request, pieces = self._reading
        try:
            next(pieces)
        except StopIteration:
            self._reading = None
        except ValueError as error:
            self._reading = None
            request.tell(error)

    def _read(self, request: Request) -> Iterator[None]:
        """Piece by piece; then the first token is chosen, and the row is live."""
        request.known, state, last = self._remembered(request.ids)
        tokens = torch.tensor([request.ids[request.known :]], device=self.model.device)
        for number, piece in enumerate(tokens.split(at_once(self.model.device), 1) if last is None else ()):
            if number:
                yield
            hidden, state = advance(self.model, piece, state)
            last = hidden[:, -1]
        assert last is not None
        check_finite(last)
        self._remember(request.ids, state, last)
        make_room(self.pool, max(state.lengths) + 1)
        (row,) = self.pool.join(state)
        self.live[row] = request
        self._step.sampler.assign(row, request.sampling, request.seed)
        self._step.sampler.hold(row, request.ids)
        self.requests += 1
        self._told({row: int(self._step.choose(last, self.pool.at([row])))})

    def _write(self) -> None:
        rows = sorted(self.live)
        make_room(self.pool, max(self.pool.lengths) + 1)
        self._told(dict(zip(rows, self._step(self.pool.at(rows)).tolist(), strict=True)))

    def _told(self, chosen: dict[int, int]) -> None:
        for row, token in chosen.items():
            request = self.live[row]
            if token < 0:
                self._leave(row)
                request.tell(not_finite())
                continue
            if token not in request.ends:
                request.tokens.append(token)
                request.tell(token)
                self.written += 1
            if token in request.ends or len(request.tokens) == request.max_tokens:
                if self.keep:
                    read = [*request.ids, *request.tokens]
                    self._remember(read if token in request.ends else read[:-1], self.pool.take([row]))
                self._leave(row)
                request.tell(None)

    def _leave(self, row: int) -> None:
        del self.live[row]
        self.pool.leave([row])
        self._step.sampler.assign(row, Sampling(), 0)

    def _remembered(self, ids: list[int]) -> tuple[int, ModelState, Tensor | None]:
        """The longest beginning of these tokens that a state is kept of; of all of them only with what the head reads next."""
        for n in sorted({len(known) for known in self._kept if len(known) <= len(ids)}, reverse=True):
            state, last = self._kept.get(tuple(ids[:n]), (None, None))
            if state is not None and (n < len(ids) or last is not None):
                self._kept.move_to_end(tuple(ids[:n]))
                return n, state, last if n == len(ids) else None
        return 0, self.model.init_state(1, len(ids)), None

    def _remember(self, read: list[int], state: ModelState, last: Tensor | None = None) -> None:
        if not self.keep:
            return
        self._kept[tuple(read)] = state, last
        self._kept.move_to_end(tuple(read))
        while len(self._kept) > self.keep:
            self._kept.popitem(last=False)

    @torch.inference_mode()
    def _end_all(self, error: Exception) -> None:
        with self._asked:
            told = {*self.live.values(), *(self._reading or ())[:1], *self.waiting}
            self.waiting.clear()
        self._kept.clear()
        self._reading = None
        for row in list(self.live):
            self._leave(row)
        for request in told:
            with suppress(RuntimeError):  # of a loop that has ended
                request.tell(error)
