"""What a layer keeps of all tokens, such as keys and values: a handle is a length into a buffer that is only appended to.

An older handle may be used again, which is how a draft is rolled back: the buffer then continues from there, and
handles to what was overwritten raise `StaleState` instead of reading somebody else's keys.

A compiled call knows no lengths but those on the device, so it appends by a copy: its handles are lined up at their newest
token, and can never be stale. The next call that is not compiled lines them up at the first token again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.state.values import State

SIZED = 2  # empty places that a compiled call begins with: sizes 0 and 1 are special to torch.compile, each a graph of its own


class StaleState(RuntimeError):
    """A state was used after another continuation had overwritten its keys."""


@dataclass(eq=False)
class Buffer:
    """Storage by name, each (b, capacity, ...), shared by handles, and the line of writes that its content comes from."""

    tensors: dict[str, Tensor]
    line: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # (epoch, length of each row it reached)
    epochs: int = 0

    @property
    def capacity(self) -> int:
        return next(iter(self.tensors.values())).shape[1]

    def holds(self, epoch: int, lengths: tuple[int, ...]) -> bool:
        """Whether what a handle saw is still there."""
        if self.line[-1] == (epoch, lengths):
            return True
        for known, reached in self.line:
            if known == epoch:
                return all(a <= b for a, b in zip(lengths, reached, strict=True))
        return False

    def advance(self, epoch: int, before: tuple[int, ...], after: tuple[int, ...]) -> int:
        """Record a write that continues the handle (epoch, before); gives the epoch of the new handle."""
        if self.line[-1] == (epoch, before):
            self.line[-1] = (epoch, after)
            return epoch
        while self.line[-1][0] != epoch:
            self.line.pop()
        self.epochs += 1
        self.line[-1] = (epoch, before)
        self.line.append((self.epochs, after))
        return self.epochs

    def reserve(self, length: int) -> None:
        """Room for `length` tokens that this call may write to: of what a copy made in inference mode holds, none outside of
        it. Grows by doubling, so that appending costs one copy per token on average."""
        held = next(iter(self.tensors.values())).is_inference() and not torch.is_inference_mode_enabled()
        if length > self.capacity or held:
            extra = max(length, 2 * self.capacity, 64) - self.capacity if length > self.capacity else 0
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # or only calls in inference mode could append to it later
                self.tensors = {name: _longer(x, extra) for name, x in self.tensors.items()}


def _longer(x: Tensor, extra: int) -> Tensor:
    return torch.cat([x, x.new_zeros(x.shape[0], extra, *x.shape[2:])], 1)


@dataclass(frozen=True, eq=False)
class Appended(State):
    """A handle: `lengths[r]` tokens of row r of the buffer; or, after a compiled call, the `seen[r]` newest ones."""

    buffer: Buffer
    lengths: tuple[int, ...]
    epoch: int = 0
    seen: Int[Tensor, " b"] | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], lengths: tuple[int, ...]) -> Self:
        """A handle to a fresh buffer."""
        return cls(Buffer(dict(tensors), [(0, lengths)]), lengths)

    def check(self) -> None:
        """Raise `StaleState` if another continuation has overwritten these keys."""
        if not self.buffer.holds(self.epoch, self.lengths):
            raise StaleState(
                f"this state's keys (tokens per row: {list(self.lengths)}) were overwritten when an earlier state was "
                "continued; keep using the newer state, or fork() the state that both continuations start from"
            )

    def settled(self) -> Self:
        """The same lined up at the first token, and not stale."""
        if self.seen is None:
            self.check()
            return self
        lengths = tuple(self.seen.tolist())
        longest, capacity = max(lengths), self.buffer.capacity
        ramp = torch.arange(longest, device=self.seen.device)
        place = (ramp + capacity - self.seen[:, None]).clamp_max(capacity - 1)
        row = torch.arange(len(lengths), device=self.seen.device)[:, None]
        return self.of({name: x[row, place] for name, x in self.buffer.tensors.items()}, lengths)

    def extend(
        self, new: Sequence[Float[Tensor, "b t *k"]], rows: Int[Tensor, "..."] | None, at: Tensor | None
    ) -> tuple[Self, tuple[Tensor, ...]]:
        """The handle after these tokens (of each tensor, in order), and all that is kept up to the longest row.

        With rows of one length, `rows` and `at` are None; else they say row and position of each new token.
        """
        self = self.settled()  # noqa: PLW0642 (the handle that is meant)
        if rows is None:
            after = tuple([n + new[0].shape[1] for n in self.lengths])
        else:
            counts = torch.bincount(rows.flatten(), minlength=len(self.lengths)).tolist()
            after = tuple(n + c for n, c in zip(self.lengths, counts, strict=True))
        buffer, end = self.buffer, max(after)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*new, *buffer.tensors.values())):
            return self._extend_pure(new, rows, at, after)
        buffer.reserve(end)
        for storage, x in zip(buffer.tensors.values(), new, strict=True):
            if rows is None:
                storage.narrow(1, self.lengths[0], x.shape[1]).copy_(x)
            else:
                storage.index_put_((rows, at), x.to(storage.dtype))  # type: ignore[arg-type]  # beside rows there is `at`
        handle = type(self)(buffer, after, buffer.advance(self.epoch, self.lengths, after))
        return handle, tuple([x.narrow(1, 0, end) for x in buffer.tensors.values()])

    def _extend_pure(
        self, new: Sequence[Tensor], rows: Tensor | None, at: Tensor | None, after: tuple[int, ...]
    ) -> tuple[Self, tuple[Tensor, ...]]:
        """The same into a new buffer, so that gradients flow through the state."""
        grown = []
        for storage, x in zip(self.buffer.tensors.values(), new, strict=True):
            kept = storage[:, : max(self.lengths)]
            if rows is None:
                grown.append(torch.cat([kept, x.to(kept.dtype)], 1))
            else:
                room = _longer(kept, max(after) - kept.shape[1])
                grown.append(room.index_put((rows, at), x.to(room.dtype)))  # type: ignore[arg-type]  # as above
        return self.of(dict(zip(self.buffer.tensors, grown, strict=True)), after), tuple(grown)

    def lined_up(
        self, new: Sequence[Float[Tensor, "b t *k"]], starts: Int[Tensor, " b"]
    ) -> tuple[Self, tuple[Tensor, ...]]:
        """`extend` as a compiled call does it, for rows that have seen `starts` tokens: all that is kept, the newest last.
        What lies before a row's first token is not to be looked at."""
        kept = self.buffer.tensors
        if self.seen is None:
            kept = {name: _at_the_end(x, starts) for name, x in kept.items()}
        grown = tuple(torch.cat([x, y.to(x.dtype)], 1) for x, y in zip(kept.values(), new, strict=True))
        handle = type(self)(Buffer(dict(zip(kept, grown, strict=True))), (), 0, starts + new[0].shape[1])
        return handle, grown

    def tensors(self) -> dict[str, Tensor]:
        return self.settled().buffer.tensors

    def map(self, change: Callable[[Tensor], Tensor], lengths: tuple[int, ...] | None = None) -> Self:
        """A handle to a new buffer whose tensors are `change`d."""
        here = self.settled()
        return self.of({name: change(x) for name, x in here.buffer.tensors.items()}, lengths or here.lengths)


def _at_the_end(x: Float[Tensor, "b c *k"], lengths: Int[Tensor, " b"]) -> Tensor:
    """Rows of which the first `lengths` tokens count, moved so that these come last; some room before them."""
    capacity = x.shape[1]
    place = torch.arange(-SIZED, capacity, device=x.device) + lengths[:, None] - capacity
    row = torch.arange(len(lengths), device=x.device)[:, None]
    return x[row, place.clamp_min(0)] if capacity else x.new_zeros(x.shape[0], SIZED, *x.shape[2:])


class KV(Appended):
    """Keys and values of full attention, (b, tokens, h, k) each."""

    kind: ClassVar[str] = "kv"


class Latent(Appended):
    """What latent attention reads keys and values of all heads off: (b, tokens, 1, rank + rope)."""

    kind: ClassVar[str] = "latent"
