"""What every layer of one call shares: positions, packing, and a place for numbers worth reporting."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from plait.ops.packing import Packing


@dataclass(eq=False)
class Context:
    """Built once per call. `lengths` are the tokens each row has seen before it.

    `positions` restart at 0 at each document and go on where a state left off. `reports` is where the layers of a slot leave
    numbers about this call, each under its `path` in the slot; nothing is left on modules. Which slot it is nobody inside
    knows, so that equal slots are one graph to torch.compile. `embeddings` (b, t, d), what the first slot reads, are there
    where another slot reads them too.
    """

    positions: Int[Tensor, "b t"]
    lengths: tuple[int, ...]
    packing: Packing | None = None
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    path: str = ""
    embeddings: Tensor | None = None
    _cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def ragged(self) -> bool:
        """Whether rows stand at different positions, so that keys must be placed row by row."""
        return self.packing is not None or any(n != self.lengths[0] for n in self.lengths)

    @property
    def starts(self) -> Int[Tensor, " b"]:
        """`lengths` on the device."""
        return self.cached("starts", lambda: torch.tensor(self.lengths, device=self.positions.device))

    @property
    def rows(self) -> Int[Tensor, "b t"]:
        """Each token's row of the state."""
        if self.packing is not None:
            return self.packing.documents[None]
        places = self.cached("rows", lambda: torch.arange(len(self.lengths), device=self.positions.device))
        return places[:, None].expand_as(self.positions)

    def cached(self, key: Any, compute: Callable[[], Any]) -> Any:
        """`compute()` for the first layer that asks for `key`, the same value for the others."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def slot(self) -> Callable[[], "Context"]:
        """Makes the same call as the next slot sees it, each time anew: a slot that is recomputed must see what it saw."""
        known = dict(self._cache)
        return lambda: Context(self.positions, self.lengths, self.packing, {}, "", self.embeddings, dict(known))

    def keep(self, slot: "Context") -> None:
        """What a slot has computed once is there for the slots after it."""
        self._cache.update(slot._cache)

    def inside(self, part: int) -> "Context":
        """The same call as a part of this layer sees it."""
        path = f"{self.path}.{part}"
        return Context(self.positions, self.lengths, self.packing, self.reports, path, _cache=self._cache)

    def report(self, name: str, value: Any) -> None:
        """Leave a number about this call."""
        self.reports.setdefault(self.path, {})[name] = value


def context_for(
    inputs: Shaped[Tensor, "b t ..."],
    lengths: tuple[int, ...] | None = None,
    documents: tuple[int, ...] | None = None,
) -> Context:
    """The context of a call: `lengths` seen before per state row, `documents` the packed lengths (batch 1)."""
    (b, t), device = inputs.shape[:2], inputs.device
    packing = Packing(documents, device) if documents is not None else None
    before = lengths or (0,) * (b if documents is None else len(documents))
    if packing is not None:
        positions = packing.offsets
        if any(before):
            positions = positions + torch.tensor(before, device=device)[packing.documents]
    elif len(set(before)) == 1:
        positions = torch.arange(before[0], before[0] + t, device=device).expand(b, t)
    else:
        positions = torch.tensor(before, device=device)[:, None] + torch.arange(t, device=device)
    return Context(positions, before, packing)
