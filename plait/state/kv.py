"""Keys and values of full attention: a handle is a length into a buffer that is only appended to.

An older handle may be used again, which is how a draft is rolled back: the buffer then continues from there, and
handles to what was overwritten raise `StaleState` instead of reading somebody else's keys.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor


class StaleState(RuntimeError):
    """A state was used after another continuation had overwritten its keys."""


@dataclass(eq=False)
class KVBuffer:
    """Storage (b, capacity, h, k) shared by handles, and the line of writes that its present content comes from."""

    k: Tensor
    v: Tensor
    line: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # (epoch, length of each row it reached)
    epochs: int = 0

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
        """Room for `length` tokens; grows by doubling, so that appending costs one copy per token on average."""
        if length > self.k.shape[1]:
            extra = max(length, 2 * self.k.shape[1], 64) - self.k.shape[1]
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # or only calls in inference mode could append to it later
                self.k, self.v = (
                    torch.cat([x, x.new_zeros(x.shape[0], extra, *x.shape[2:])], 1) for x in (self.k, self.v)
                )


@dataclass(frozen=True, eq=False)
class KV:
    """A handle: `lengths[r]` tokens of row r of the buffer."""

    kind: ClassVar[str] = "kv"
    buffer: KVBuffer
    lengths: tuple[int, ...]
    epoch: int = 0

    @classmethod
    def of(cls, k: Float[Tensor, "b c h k"], v: Float[Tensor, "b c h k"], lengths: tuple[int, ...]) -> Self:
        """A handle to a fresh buffer."""
        return cls(KVBuffer(k, v, [(0, lengths)]), lengths)

    def check(self) -> None:
        """Raise `StaleState` if another continuation has overwritten these keys."""
        if not self.buffer.holds(self.epoch, self.lengths):
            raise StaleState(
                f"this state's keys (tokens per row: {list(self.lengths)}) were overwritten when an earlier state was "
                "continued; keep using the newer state, or fork() the state that both continuations start from"
            )

    def extend(
        self,
        k: Float[Tensor, "b t h k"],
        v: Float[Tensor, "b t h k"],
        rows: Int[Tensor, "..."] | None,
        at: Tensor | None,
    ) -> tuple[Self, Tensor, Tensor]:
        """The handle after these tokens, and all keys and values up to the longest row.

        With rows of one length, `rows` and `at` are None; else they say row and position of each token of `k`.
        """
        self.check()
        if rows is None:
            after = tuple(n + k.shape[1] for n in self.lengths)
        else:
            counts = torch.bincount(rows.flatten(), minlength=len(self.lengths)).tolist()
            after = tuple(n + c for n, c in zip(self.lengths, counts, strict=True))
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad or self.buffer.k.requires_grad):
            return self._extend_pure(k, v, rows, at, after)
        buffer, end = self.buffer, max(after)
        buffer.reserve(end)
        with torch.no_grad():
            for storage, new in ((buffer.k, k), (buffer.v, v)):
                if rows is None:
                    storage.narrow(1, self.lengths[0], k.shape[1]).copy_(new)
                else:
                    storage.index_put_((rows, at), new.to(storage.dtype))
        handle = type(self)(buffer, after, buffer.advance(self.epoch, self.lengths, after))
        return handle, buffer.k.narrow(1, 0, end), buffer.v.narrow(1, 0, end)

    def _extend_pure(
        self, k: Tensor, v: Tensor, rows: Tensor | None, at: Tensor | None, after: tuple[int, ...]
    ) -> tuple[Self, Tensor, Tensor]:
        """The same into a new buffer, so that gradients flow through the state."""
        grown = []
        for storage, new in ((self.buffer.k, k), (self.buffer.v, v)):
            kept = storage[:, : max(self.lengths)]
            if rows is None:
                grown.append(torch.cat([kept, new.to(kept.dtype)], 1))
            else:
                room = torch.cat([kept, kept.new_zeros(len(kept), max(after) - kept.shape[1], *kept.shape[2:])], 1)
                grown.append(room.index_put((rows, at), new.to(room.dtype)))
        keys, values = grown
        return type(self).of(keys, values, after), keys, values

    def tensors(self) -> dict[str, Tensor]:
        return {"k": self.buffer.k, "v": self.buffer.v}

    def map(self, change: Callable[[Tensor], Tensor], lengths: tuple[int, ...] | None = None) -> Self:
        """A handle to a new buffer whose tensors are `change`d."""
        self.check()
        return type(self).of(change(self.buffer.k), change(self.buffer.v), lengths or self.lengths)
