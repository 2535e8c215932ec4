"""The front: from tokens or vectors to what the first slot reads."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.ops.packing import Packing


@dataclass(frozen=True, eq=False)
class Stretch:
    """Inputs with meta tokens before those rows that begin with this call."""

    x: Float[Tensor, "b t d"]
    packing: Packing | None
    text: Int[Tensor, " n"] | slice | None  # where the inputs themselves are, along t; None: they are all there is
    shape: torch.Size  # (b, t) of the inputs

    def only_text(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """What became of the inputs."""
        if self.text is None:
            return hidden
        kept = hidden[:, self.text]
        return kept if kept.shape[:2] == self.shape else kept.view(*self.shape, -1)


def with_meta(
    x: Float[Tensor, "b t d"],
    meta: Float[Tensor, "m d"] | None,
    seen: tuple[int, ...] | None,
    packing: Packing | None,
) -> Stretch:
    """Put the meta tokens before each row that has `seen` nothing yet (None: none has). Rows that stand differently are packed
    end to end."""
    if meta is None or (seen is not None and 0 not in seen):
        return Stretch(x, packing, None, x.shape[:2])
    meta = meta.to(x.dtype)
    if seen is not None and any(seen):
        return _before_some(x, meta, seen, packing)
    if packing is None:
        return Stretch(torch.cat([meta.expand(len(x), -1, -1), x], 1), None, slice(len(meta), None), x.shape[:2])
    return _before_documents(x, meta, packing)


def _before_documents(x: Float[Tensor, "1 t d"], meta: Float[Tensor, "m d"], packing: Packing) -> Stretch:
    """Before each, by tensors alone, so that a compiled graph holds no document's length."""
    t, m = x.shape[1], len(meta)
    longer = packing.cu_seqlens + m * torch.arange(packing.count + 1, device="cpu")
    stretched = Packing.of(longer, x.new_empty(1, t + m * packing.count))
    offsets, place = stretched.offsets[0], torch.arange(t + m * packing.count, device=x.device)
    source = torch.where(offsets < m, offsets, place - m * stretched.documents)  # in meta, and in x behind it
    text = torch.arange(t, device=x.device) + m * (packing.documents + 1)
    return Stretch(torch.cat([meta, x[0]])[source][None], stretched, text, x.shape[:2])


def _before_some(
    x: Float[Tensor, "b t d"], meta: Float[Tensor, "m d"], seen: tuple[int, ...], packing: Packing | None
) -> Stretch:
    """Before those that have seen nothing."""
    m, shape = len(meta), x.shape[:2]
    counts = (shape[1],) * shape[0] if packing is None else packing.lengths
    starts = [0, *accumulate(counts)]
    order: list[int] = []
    text: list[int] = []
    for start, count, before in zip(starts, counts, seen, strict=False):
        order += [] if before else range(m)
        text += range(len(order), len(order) + count)
        order += range(m + start, m + start + count)
    together = torch.cat([meta, x.flatten(0, 1)])
    longer = (count + (0 if before else m) for count, before in zip(counts, seen, strict=True))
    index = torch.tensor(order, device=x.device)
    stretched = Packing.of_lengths(longer, x.device)
    return Stretch(together[index][None], stretched, torch.tensor(text, device=x.device), shape)
