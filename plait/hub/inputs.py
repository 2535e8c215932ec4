"""What transformers' callers hand to a model, as plait takes it: refused in one line where it has no meaning here."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from plait.hub.cache import PlaitCache
from plait.model.loss import IGNORE

READ_AS_THEY_ARE = (torch.int32, torch.int64)


def whole_numbers(name: str, x: Any) -> Int[Tensor, "b t"]:
    """`x` as ids, of whichever integer dtype it comes in."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor of integers, shape (batch, time); got {type(x).__name__}")
    integers = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    if x.ndim != 2 or not integers:
        raise ValueError(f"{name} must be integers of shape (batch, time), got {tuple(x.shape)} {x.dtype}")
    if x.numel() == 0:
        raise ValueError(f"{name} is empty, shape {tuple(x.shape)}: a call needs at least one row of one token")
    return x if x.dtype in READ_AS_THEY_ARE else x.long()


def check_labels(labels: Any, tokens: Int[Tensor, "b t"], vocab: int) -> Int[Tensor, "b t"]:
    """Labels as int64. Raises ValueError for one that is neither in the vocabulary nor -100."""
    labels = whole_numbers("labels", labels).long()
    if labels.shape != tokens.shape:
        raise ValueError(f"labels must have input_ids' shape {tuple(tokens.shape)}, got {tuple(labels.shape)}")
    # as for token ids, a device is not asked; there, cross-entropy's own assertion stops the program
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (labels != IGNORE) & ((labels < 0) | (labels >= vocab))
        if wrong.any():
            raise ValueError(
                f"label {int(labels[wrong][0])} is outside the vocabulary of {vocab}; what is not to be learned is {IGNORE}"
            )
    return labels


def last_columns(
    attention_mask: Tensor | None, tokens: Int[Tensor, "b t"], cache: PlaitCache | None
) -> Int[Tensor, "b t"] | None:
    """The part of a mask over past and present that is about these tokens."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask must have shape (batch, time), 1 for tokens and 0 for padding; got {shape}")
    past, width = _past(cache), tokens.shape[1]
    if attention_mask.shape[1] not in (width, past + width):
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns; expected {width}, those of input_ids"
            + (f", or {past + width} with the {past} of the cache" if past else "")
        )
    return attention_mask[:, -width:]


def document_starts(
    position_ids: Any, tokens: Int[Tensor, "b t"], mask: Tensor | None, cache: PlaitCache | None
) -> Bool[Tensor, "b t"] | None:
    """Where packed documents begin, on the CPU, if `position_ids` start again at 0; None if they merely count.

    A plait model counts for itself, so that any other numbers would be ignored: ValueError. Counting begins with a
    row's first token or with its first column, padding included; both are usual.
    """
    if position_ids is None:
        return None
    given = whole_numbers("position_ids", position_ids).cpu().long()
    if given.shape[1] != tokens.shape[1] or given.shape[0] not in (1, tokens.shape[0]):
        raise ValueError(f"position_ids must have input_ids' shape {tuple(tokens.shape)}, got {tuple(given.shape)}")
    given = given.expand(tokens.shape)
    columns = torch.arange(tokens.shape[1], device="cpu")
    real = torch.ones(tokens.shape, dtype=torch.bool, device="cpu") if mask is None else mask.cpu() != 0
    past = _past(cache)
    seen = (0,) * len(tokens) if cache is None or cache.state is None else cache.state.lengths
    counts = real.cumsum(1) - 1 + torch.tensor(seen, device="cpu")[:, None], columns + past
    if any(bool(((given == count) | ~real).all()) for count in counts):
        return None
    starts = given == 0
    follows = given[:, 1:] == given[:, :-1] + 1
    packed = starts[:, 0].all() and (starts[:, 1:] | follows).all()
    if not packed or not real.all() or past:
        raise ValueError(
            "position_ids must count each row's tokens on from where it stands, or start again at 0 at each document of "
            f"rows packed without padding and without a cache; row 0 has {given[0, :8].tolist()}"
            + (" …" if given.shape[1] > 8 else "")
        )
    return starts


def check_cache_position(cache_position: Tensor | None, width: int, cache: PlaitCache | None) -> None:
    """Older callers say where in the cache these tokens go: only its end is possible."""
    if cache_position is None:
        return
    past = _past(cache)
    if cache_position.flatten().tolist() != list(range(past, past + width)):
        raise ValueError(f"cache_position must be {past} to {past + width - 1}: a plait state only goes on at its end")


def _past(cache: PlaitCache | None) -> int:
    """Columns that the cache has seen; a transformers cache has a length, so that a fresh one is false."""
    return 0 if cache is None else cache.length


def refuse(others: dict[str, Any]) -> None:
    """ValueError for what some models of transformers take and this one would have to ignore."""
    named = sorted(name for name, value in others.items() if value is not None)
    if named:
        raise ValueError(
            f"a plait model does not take {', '.join(named)}; it takes input_ids, attention_mask, position_ids (starting "
            "again at 0 at each packed document), past_key_values and labels"
        )
