"""Padding and packing as the model receives them. Padding never reaches a layer: padded rows become packed documents."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from plait.ops.operator import operator
from plait.ops.packing import Packing


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


def packed(tokens: Shaped[Tensor, "1 t ..."], cu_seqlens: Any, most: int | None) -> Packing:
    """The packing that offsets describe. Raises ValueError for offsets that do not cut the row into documents, and for a
    document of more than `most` tokens. Offsets on a device are waited for; give them on the CPU."""
    if not isinstance(cu_seqlens, Tensor):
        cu_seqlens = torch.as_tensor(cu_seqlens, device="cpu")
    if cu_seqlens.ndim != 1 or not _integers(cu_seqlens.dtype):
        raise ValueError(
            f"cu_seqlens must be integers of shape (documents + 1,), got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if tokens.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs documents packed in one row, got a batch of {tokens.shape[0]}")
    cu_seqlens = cu_seqlens.to("cpu", torch.int64)
    if torch.compiler.is_compiling():  # an operator may look at numbers
        return Packing.of(_checked(cu_seqlens, tokens.shape[1], most), tokens)
    _check(cu_seqlens, tokens.shape[1], most)
    return Packing.of(cu_seqlens, tokens)


def _integers(dtype: torch.dtype) -> bool:
    return dtype != torch.bool and not dtype.is_floating_point and not dtype.is_complex


def _check(cu_seqlens: Int[Tensor, " n+1"], tokens: int, most: int | None) -> None:
    offsets = cu_seqlens.tolist()
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(f"cu_seqlens must run from 0 to the number of tokens, {tokens}; got {offsets}")
    lengths = [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
    for document, length in enumerate(lengths):
        if length <= 0:
            raise ValueError(f"cu_seqlens: document {document} has {length} tokens; each needs at least one")
    check_longest(max(lengths), most)


@operator("checked_documents")
def _checked(cu_seqlens: Tensor, tokens: int, most: int | None) -> Tensor:
    _check(cu_seqlens, tokens, most)
    return cu_seqlens.clone()


@torch.library.register_fake("plait::checked_documents")
def _(cu_seqlens, tokens, most):
    return torch.empty_like(cu_seqlens)


def check_longest(tokens: int, most: int | None) -> None:
    """Raise ValueError for a sequence that is longer than positions go."""
    if most is not None and tokens > most:
        raise ValueError(
            f"a sequence of {tokens} tokens is longer than this model's positions go (max_positions {most})"
        )
