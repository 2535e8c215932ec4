"""The front: from tokens or vectors to what the first slot reads."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Stretch:
    """Inputs with meta tokens before those rows that begin with this call."""

    x: Float[Tensor, "b t d"]
    documents: tuple[int, ...] | None
    text: Int[Tensor, " n"] | slice  # where the inputs themselves are, along t
    shape: torch.Size  # (b, t) of the inputs

    def only_text(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """What became of the inputs."""
        kept = hidden[:, self.text]
        return kept if kept.shape[:2] == self.shape else kept.view(*self.shape, -1)


def with_meta(
    x: Float[Tensor, "b t d"],
    meta: Float[Tensor, "m d"] | None,
    seen: tuple[int, ...],
    documents: tuple[int, ...] | None,
) -> Stretch:
    """Put the meta tokens before each row that has seen nothing yet. Rows that stand differently are packed end to end."""
    shape = x.shape[:2]
    if meta is None or 0 not in seen:
        return Stretch(x, documents, slice(None), shape)
    m, meta = len(meta), meta.to(x.dtype)
    if documents is None and not any(seen):
        return Stretch(torch.cat([meta.expand(len(x), m, -1), x], 1), None, slice(m, None), shape)
    counts = documents or (shape[1],) * shape[0]
    starts = [0, *accumulate(counts)]
    order: list[int] = []
    text: list[int] = []
    for start, count, before in zip(starts, counts, seen, strict=False):
        order += [] if before else range(m)
        text += range(len(order), len(order) + count)
        order += range(m + start, m + start + count)
    together = torch.cat([meta, x.flatten(0, 1)])
    longer = tuple(count + (0 if before else m) for count, before in zip(counts, seen, strict=True))
    index = torch.tensor(order, device=x.device)
    return Stretch(together[index][None], longer, torch.tensor(text, device=x.device), shape)
