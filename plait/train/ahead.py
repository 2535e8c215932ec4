"""The next batch, read and brought to the device in a thread while the device works on the one before."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import torch

from plait.train.inputs import Batches
from plait.train.step import split


@dataclass(frozen=True, slots=True)
class Ready:
    """A batch as it was read, on the host; its parts on the device, with the plan of their documents' chunks; and where the
    batches stand after it."""

    batch: Any
    parts: list[Any]
    place: dict[str, Any]


class Ahead:
    """Batches, each cut into `parts` on `device`. `count` of them are asked for at least, and so many are read ahead.

    What reading raises is raised where the batch is asked for. `place` is where the batches stand after the last one that was.
    """

    def __init__(self, batches: Batches, count: int, parts: int, device: torch.device):
        self._batches, self._left, self._parts, self._device = batches, count, parts, device
        self._thread = ThreadPoolExecutor(1, "plait-batches")
        self.place = batches.state_dict()
        self._next: Future[Ready] | None = None

    def __next__(self) -> Ready:
        coming, self._next, self._left = self._next, None, self._left - 1
        ready = self._read() if coming is None else coming.result()
        if self._left > 0:
            self._next = self._thread.submit(self._read)
        self.place = ready.place
        return ready

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read(self) -> Ready:
        batch = next(self._batches)
        parts = [part.to(self._device) for part in split(batch, self._parts)]
        return Ready(batch, parts, self._batches.state_dict())
