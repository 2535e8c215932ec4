"""Which queries of packed documents see which keys, as calls of kernels that know causal masks and windows alone.

A window is one such call. The prefix that it leaves behind is two more: past the window the i-th query of a document sees keys
0 to i until it sees the whole prefix, as any later one does. What each call gives joins by its sum of weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from jaxtyping import Int
from torch import Tensor

from plait.ops.packing import KEPT, Packing, sent


class Stretches:
    """Stretches of a packed row, one a document, end to end: what kernels ask of a `Packing`, without the chunks that it plans
    and the place that it takes among those kept."""

    def __init__(self, starts: Sequence[int], lengths: Sequence[int], device: torch.device):
        self.starts, self.lengths, self.device = starts, lengths, device

    @property
    def count(self) -> int:
        return len(self.lengths)

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Where each begins and ends, end to end."""
        ends = tuple(accumulate(self.lengths, initial=0))
        return tuple(zip(ends, ends[1:], strict=False))

    @cached_property
    def places(self) -> Int[Tensor, " t"]:
        """Where each of their tokens is in the row."""
        return self._sent(
            lambda: torch.cat([torch.arange(n) + at for at, n in zip(self.starts, self.lengths, strict=True)])
        )

    @cached_property
    def cuts(self) -> Int[Tensor, " n+1"]:
        return self._sent(lambda: torch.tensor([0, *(end for _, end in self.bounds)], dtype=torch.int32))

    @cached_property
    def documents(self) -> Int[Tensor, " t"]:
        return self._sent(lambda: torch.arange(self.count).repeat_interleave(torch.tensor(self.lengths)))

    @cached_property
    def offsets(self) -> Int[Tensor, "1 t"]:
        return self._sent(lambda: torch.cat([torch.arange(n) for n in self.lengths])[None])

    def _sent(self, made: Callable[[], Tensor]) -> Tensor:
        with torch.inference_mode(False), torch.device("cpu"):  # kept, and gradients may be taken in a later call
            return sent(made(), self.device)


@dataclass(frozen=True, eq=False)
class Span:
    """Queries and keys of n documents. causal: the i-th query of a document sees its keys up to the i-th, and with
    `window` the last so many of them; else it sees them all."""

    queries: Packing | Stretches
    keys: Packing | Stretches
    causal: bool = True
    window: int | None = None

    @cached_property
    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        """As kernels want them: where documents begin, and how long the longest is, of queries and of keys."""
        q, k = self.queries, self.keys
        return q.cuts, k.cuts, max(q.lengths), max(k.lengths)


@dataclass(frozen=True, eq=False)
class Part(Span):
    """A span of tokens that lie apart in the row."""

    queries: Stretches
    keys: Stretches

    def take(self, of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]) -> list[Tensor]:
        """These tokens of tensors (1, t, ...)."""
        q, k = self.queries.places, self.keys.places
        return [*(x.index_select(1, q) for x in of_queries), *(x.index_select(1, k) for x in of_keys)]


@lru_cache(KEPT)
def spans(packing: Packing, window: int | None, prefix: int) -> tuple[Span, tuple[Part, ...]]:
    """The window's, which has every query, and those of what it leaves behind."""
    left = left_behind(packing, window, prefix) if window is not None and prefix else ()
    return Span(packing, packing, window=window), tuple(left)


def left_behind(packing: Packing, window: int, prefix: int) -> Iterator[Part]:
    """The first `prefix` keys, of queries that a window keeps from some of them."""
    device = packing.offsets.device
    far = [(start, end - start - window) for start, end in packing.bounds if end - start > window]
    if far:
        starts, counts = zip(*((start, min(count, prefix)) for start, count in far), strict=True)
        yield Part(Stretches([start + window for start in starts], counts, device), Stretches(starts, counts, device))
    if seeing := [(start, count - prefix) for start, count in far if count > prefix]:
        starts, counts = zip(*seeing, strict=True)
        queries = Stretches([start + window + prefix for start in starts], counts, device)
        yield Part(queries, Stretches(starts, [prefix] * len(starts), device), causal=False)
