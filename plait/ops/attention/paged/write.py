"""New keys and values into their pages."""

import torch
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
    even = ends.count(ends[0]) == b
    if table is not None or not (even or t == 1) or not t <= min(ends) <= max(ends) <= k_pages.shape[1]:
        run(k_pages, v_pages, k, v, table, lengths)
        return
    if even:
        for pages, new in ((k_pages, k), (v_pages, v)):
            pages[:b, ends[0] - t : ends[0]].copy_(new)
        return
    place = torch.arange(b, device=k.device), lengths - 1
    for pages, new in ((k_pages, k), (v_pages, v)):
        pages.index_put_(place, cast(new[:, 0], pages.dtype))
