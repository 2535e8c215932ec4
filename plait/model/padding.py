"""Padding and packing as the model receives them. Padding never reaches a layer: padded rows become packed documents."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Padding:
    """Which places of padded rows hold tokens, and how many each row has."""

    mask: Bool[Tensor, "b t"]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, tokens: Int[Tensor, "b t"], attention_mask: Tensor) -> Self | None:
        """None where nothing is padded. Raises ValueError for a mask that is not 1 for tokens and 0 for padding."""
        if not isinstance(attention_mask, Tensor):
            raise ValueError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}")
        if attention_mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"attention_mask must have the tokens' shape {tuple(tokens.shape[:2])}, got {tuple(attention_mask.shape)}"
            )
        mask = attention_mask != 0
        wrong = mask & (attention_mask != 1)  # NaN too, which equals nothing
        *lengths, wrongs = torch.cat([mask.sum(1), wrong.sum()[None]]).tolist()  # both at once: a device is asked once
        if wrongs:
            raise ValueError(
                f"attention_mask holds {attention_mask[wrong][0].item()}; expected 1 for tokens and 0 for padding "
                "(documents packed in one row are given by cu_seqlens, in transformers by position_ids)"
            )
        if 0 in lengths:
            raise ValueError(f"row {lengths.index(0)} is all padding: every row needs at least one token")
        return None if min(lengths) == tokens.shape[1] else cls(mask, tuple(lengths))

    def remove(self, tokens: Int[Tensor, "b t"]) -> Int[Tensor, "1 n"]:
        """The rows' tokens end to end."""
        return tokens[self.mask][None]

    def restore(self, x: Float[Tensor, "1 n d"]) -> Float[Tensor, "b t d"]:
        """Back to padded rows, zeros where padding was."""
        places = self.mask.flatten().nonzero().squeeze(-1)
        rows = x.new_zeros(self.mask.numel(), x.shape[-1]).index_copy(0, places, x[0])
        return rows.unflatten(0, self.mask.shape)


def packed_lengths(tokens: Int[Tensor, "1 t"], cu_seqlens: Int[Tensor, " n+1"]) -> tuple[int, ...]:
    """Document lengths from offsets. Raises ValueError for offsets that do not cut the row into documents."""
    offsets = _offsets(cu_seqlens)
    if tokens.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs documents packed in one row, got a batch of {tokens.shape[0]}")
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != tokens.shape[1]:
        raise ValueError(f"cu_seqlens must run from 0 to the number of tokens, {tokens.shape[1]}; got {offsets}")
    lengths = tuple(b - a for a, b in zip(offsets, offsets[1:], strict=False))
    for document, length in enumerate(lengths):
        if length <= 0:
            raise ValueError(f"cu_seqlens: document {document} has {length} tokens; each needs at least one")
    return lengths


def _offsets(cu_seqlens: Any) -> list[int]:
    given = cu_seqlens if isinstance(cu_seqlens, Tensor) else torch.as_tensor(cu_seqlens, device="cpu")
    if given.ndim != 1 or given.dtype == torch.bool or given.is_floating_point() or given.is_complex():
        raise ValueError(
            f"cu_seqlens must be integers of shape (documents + 1,), got {tuple(given.shape)} {given.dtype}"
        )
    return given.tolist()
