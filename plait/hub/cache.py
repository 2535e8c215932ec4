"""A `ModelState` where transformers expects a cache."""

from typing import Any

import torch
from transformers import Cache

from plait.state import ModelState


class PlaitCache(Cache):
    """Holds the state after the tokens seen so far; like every transformers cache, a call that gets it moves it on."""

    def __init__(self, state: ModelState | None = None, length: int = 0):
        super().__init__(layers=[])
        self.state = state
        self.length = length  # tokens per row so far, padding included: what transformers counts

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # grows as needed

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.batch

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        self.state, self.length = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "a recurrent state cannot be cut back; keep the ModelState from before (cache.state) and go on from it"
        )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """For beam search."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.select([row for row in range(self.state.batch) for _ in range(repeats)])

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("a PlaitCache holds the state of a plait model and is moved on by that model alone")

    def _select(self, rows: torch.Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(rows.tolist())
