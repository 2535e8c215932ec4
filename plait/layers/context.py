"""What every layer of one call shares: positions, packing, and the channels out of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from plait.layers.channels import Listener, Outbox, Place, Reduction
from plait.ops.packing import Packing
from plait.state import PoolRows


@dataclass(frozen=True, eq=False)
class Context:
    """Built once per call, of device tensors and of facts that a compiler may rely on.

    `positions` restart at 0 at each document and go on where a state left off; `starts` are the tokens each row has seen
    before the call. `lengths` are the same on the host, where a call that is not compiled may know them: a shortcut, no layer
    needs it. In a pool, `rows` are the rows of its tensors that the call reads and writes, `table` their pages.

    `out` takes what the layers of a slot send by `loss`, `stat` and `tap`, each under its `path` in the slot, where anyone asks
    for it; nothing is left on modules. Which slot it is nobody inside knows, so that equal slots are one graph to
    torch.compile. `shared` holds what one slot leaves for those after it: `x0` (b, t, d), what the first slot reads, where
    another slot reads it too; values `v0`; and what is computed once for all layers.
    """

    positions: Int[Tensor, "b t"]
    starts: Int[Tensor, " b"]
    lengths: tuple[int, ...] | None = None
    packing: Packing | None = None
    rows: Int[Tensor, " b"] | slice | None = None
    table: Int[Tensor, "b n"] | None = None
    out: Outbox | None = None
    path: str = ""
    shared: dict[Any, Any] = field(default_factory=dict)

    @property
    def ragged(self) -> bool:
        """Whether rows stand at different positions, so that keys must be placed row by row."""
        return self.packing is not None or self.lengths is None or len(set(self.lengths)) > 1

    @property
    def ends(self) -> Int[Tensor, " b"]:
        """What each row will have seen after the call; not of packed documents."""
        return self.cached("ends", lambda: self.starts + self.positions.shape[1])

    @property
    def row_of(self) -> Int[Tensor, "b t"]:
        """Each token's row of the state."""
        if self.packing is not None:
            return self.packing.documents[None]
        places = self.cached("row_of", lambda: torch.arange(len(self.starts), device=self.positions.device))
        return places[:, None].expand_as(self.positions)

    def cached(self, key: Any, compute: Callable[[], Any]) -> Any:
        """`compute()` for the first layer that asks for `key`, the same value for the others."""
        if key not in self.shared:
            self.shared[key] = compute()
        return self.shared[key]

    def slot(self, listeners: Mapping[Place, Listener] | None = None) -> Callable[[], "Context"]:
        """Makes the same call as the next slot sees it, each time anew: a slot that is recomputed must see what it saw.

        Nothing that the slot sends is kept where `listeners` is None.
        """
        known = dict(self.shared)

        def make() -> Context:
            out = None if listeners is None else Outbox(listeners)
            return self._with(out, "", dict(known))

        return make

    def keep(self, slot: "Context") -> None:
        """What a slot has computed once is there for the slots after it."""
        self.shared.update(slot.shared)

    def inside(self, part: int) -> "Context":
        """The same call as a part of this layer sees it."""
        return self._with(self.out, f"{self.path}.{part}", self.shared)

    def _with(self, out: Outbox | None, path: str, shared: dict[Any, Any]) -> "Context":
        return Context(
            self.positions,
            self.starts,
            self.lengths,
            self.packing,
            self.rows,
            self.table,
            out,
            path,
            shared,
        )

    def loss(self, name: str, value: Float[Tensor, ""]) -> None:
        """Add `value`, a mean over this call's tokens that is weighted already, to what is optimised; once per name."""
        if self.out is not None and torch.is_grad_enabled():
            self.out.losses.append(((self.path, name), value))

    def stat(self, name: str, value: Any, reduction: Reduction = "max") -> None:
        """Leave a tensor, or a NamedTuple of them, about this call; `reduction`: "max" or "sum", over parts of a batch, calls,
        layers and ranks."""
        if self.out is not None:
            self.out.stats.append(((self.path, name), value, reduction))

    def tap(self, name: str, x: Tensor) -> Tensor:
        """x, or what a listener puts in its place (`plait.listening`)."""
        return x if self.out is None else self.out.tap((self.path, name), x)


def context_for(
    inputs: Shaped[Tensor, "b t ..."],
    starts: Int[Tensor, " n"] | None = None,
    lengths: tuple[int, ...] | None = None,
    packing: Packing | None = None,
) -> Context:
    """The context of a call on values: `packing` of its documents (batch 1); `starts` the tokens each row of the state has seen
    before (None: there is no state), and `lengths` the same where the host knows."""
    (b, t), device = inputs.shape[:2], inputs.device
    if starts is None:
        starts, lengths = torch.zeros(b, dtype=torch.int64, device=device), (0,) * b
    if packing is not None:
        positions = packing.offsets
        if lengths is None or any(lengths):
            positions = positions + starts[packing.documents]
    elif lengths is not None and len(set(lengths)) == 1:
        positions = torch.arange(lengths[0], lengths[0] + t, device=device).expand(b, t)
    else:
        positions = starts[:, None] + torch.arange(t, device=device)
    return Context(positions, starts, lengths, packing)


def pooled_context(inputs: Shaped[Tensor, "b t ..."], at: PoolRows) -> Context:
    """The context of a call on rows of a pool: of device tensors alone."""
    pool = at.pool
    starts, count = pool.starts[at.index], inputs.shape[1]
    if isinstance(at.index, slice):
        starts = starts.clone()  # what a view shows moves on with the call
    positions = starts[:, None] if count == 1 else starts[:, None] + torch.arange(count, device=inputs.device)
    table = None if at.straight else pool.table[at.index]
    return Context(positions, starts, rows=at.index, table=table)
