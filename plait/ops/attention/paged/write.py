"""New keys and values into their pages."""

from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from plait.ops.kernels import cast


def run(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, table: Tensor | None, lengths: Tensor) -> None:
    """Shapes as in `write_pages`."""
    (b, t), page = k.shape[:2], k_pages.shape[1]
    capacity = page if table is None else page * table.shape[1]
    at = ((lengths - t).clamp(min=0)[:, None] + torch.arange(t, device=k.device)).clamp(max=capacity - 1)  # (b, t)
    place = torch.arange(b, device=k.device)[:, None] if table is None else table.gather(1, at // page)
    for pages, new in ((k_pages, k), (v_pages, v)):
        pages[place, at % page] = new.to(pages.dtype)


def sliced(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, table: Tensor | None, lengths: Tensor) -> None:
    """The same where the host may read lengths for nothing, and each row has a page of its own: rows of one length are a slice,
    a token of each a place of each."""
    (b, t), ends = k.shape[:2], lengths.tolist()
    even, whole = ends.count(ends[0]) == b, k_pages.is_contiguous() and v_pages.is_contiguous()
    if table is not None or not (even or t == 1 and whole) or not t <= min(ends) <= max(ends) <= k_pages.shape[1]:
        run(k_pages, v_pages, k, v, table, lengths)
        return
    if even:
        for pages, new in ((k_pages, k), (v_pages, v)):
            pages[:b, ends[0] - t : ends[0]].copy_(new)
        return
    place = _places(tuple(ends), k_pages.shape[1])
    for pages, new in ((k_pages, k), (v_pages, v)):
        pages.view(-1, pages[0, 0].numel()).index_copy_(0, place, cast(new, pages.dtype).reshape(b, -1))


@lru_cache(maxsize=8)  # the layers of a step ask for the same one after the other
def _places(ends: tuple[int, ...], page: int) -> Int[Tensor, " b"]:
    """Where each row's last token lies, counted through all pages."""
    with torch.inference_mode(False):
        return torch.tensor([row * page + end - 1 for row, end in enumerate(ends)], device="cpu")
