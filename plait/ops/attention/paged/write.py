"""New keys and values into their pages."""

import torch
from torch import Tensor


def run(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, table: Tensor | None, lengths: Tensor) -> None:
    """Shapes as in `write_pages`."""
    (b, t), page = k.shape[:2], k_pages.shape[1]
    capacity = page if table is None else page * table.shape[1]
    at = ((lengths - t).clamp(min=0)[:, None] + torch.arange(t, device=k.device)).clamp(max=capacity - 1)  # (b, t)
    place = torch.arange(b, device=k.device)[:, None] if table is None else table.gather(1, at // page)
    for pages, new in ((k_pages, k), (v_pages, v)):
        pages[place, at % page] = new.to(pages.dtype)
