"""What the teacher says of a text, computed once and kept on disk: at each token its likeliest next ids and their ln p.

    meta.json             of which teacher and text, in pieces of which length, in the order of which seed, how many ids
    000000.safetensors    of `PIECES` pieces, end to end: ids (tokens, k), logp (tokens, k) float16, left (tokens) float32: what
                          all other ids have together

Training reads the same pieces epoch after epoch, in another order each time, so that the teacher need not read any twice. They
lie in the order of the first epoch, and no more of them than are read; where more are to be read later, the rest is added. A
piece that the end of a batch has cut goes on in the next batch without its beginning, which the teacher had seen: nothing is
learned of such a rest.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from plait.data import Batch, Loader
from plait.design.load import read_mapping
from plait.design.summary import size
from plait.files import json_text, write_text
from plait.model import LanguageModel
from plait.train.heldout import NO_TARGET, packed
from plait.train.step import autocast

PIECES = 512  # in a file: what a run that is killed computes again
TOKENS = 16_384  # that the teacher reads at once
ROWS = 1_024  # whose logits exist at once
LOGP, LEFT = 2, 4  # bytes
NAMES = ("ids", "logp", "left")
META = "meta.json"


class Remembered:
    """The teacher's `top` likeliest ids at every token of the pieces that the first `steps` batches of `loader` read, in
    `folder`."""

    def __init__(self, folder: Path, loader: Loader, steps: int, top: int, teacher_hash: str):
        self.folder, self.shards, self.top = folder, loader.shards, top
        own = {"text": loader.shards.key, "length": loader.length, "seed": loader.seed}
        self.meta = {"teacher": teacher_hash, "top": top} | own
        self.starts, self.lengths = loader.pieces_of(epoch=0)
        self.sorted = np.argsort(self.starts)
        self.before = np.concatenate(([0], np.cumsum(self.lengths)))  # tokens before each piece
        read = steps * loader.batch * loader.length
        self.count = min(len(self.starts), int(np.searchsorted(self.before, read)))  # of pieces
        self.ids_dtype = torch.uint16 if loader.shards.vocab <= 2**16 else torch.int32
        self._open: dict[int, Any] = {}

    @property
    def tokens(self) -> int:
        return int(self.before[self.count])

    @property
    def bytes(self) -> int:
        return self.tokens * (self.top * self._each + LEFT)

    @property
    def _each(self) -> int:
        return LOGP + self.ids_dtype.itemsize

    def check(self) -> None:
        """Raise ValueError where the folder holds another teacher's or text's, or its disk has no room for what is missing."""
        path = self.folder / META
        if path.is_file() and (theirs := read_mapping(path)) != self.meta:
            name = next(name for name in self.meta if theirs.get(name) != self.meta[name])
            raise ValueError(f"{self.folder} is of {name} {theirs.get(name)!r}, not {self.meta[name]!r}: remove it")
        there = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        home = next(folder for folder in (self.folder, *self.folder.parents) if folder.is_dir())
        free = shutil.disk_usage(home).free
        if self.bytes - there > free:
            fits = max(0, (free + there) // self.tokens - LEFT) // self._each
            what = f"top={fits} would fit" if fits else "leave top out, and the teacher runs at every step"
            raise ValueError(
                f"top: {self.top} ids of {self.tokens:,} tokens are {size(self.bytes)}, and {home} has {size(free)} "
                f"free; {what}"
            )

    def missing(self) -> list[int]:
        """The files that are not there yet, or hold fewer pieces than are read."""
        return [i for i in range(-(-self.count // PIECES)) if not self._holds(i)]

    def write(self, number: int, teacher: LanguageModel, precision: str) -> None:
        """Compute a file: whole, or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / META).is_file():
            write_text(self.folder / META, json_text(self.meta) + "\n")
        found = zip(*self._likeliest(number, teacher, precision), strict=True)
        temporary = self.folder / f".{number:06}.tmp"
        save_file(dict(zip(NAMES, map(torch.cat, found), strict=True)), temporary)
        temporary.replace(self._path(number))
        self._open.pop(number, None)

    def read(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """ids (n, k), their ln p (n, k), and what is left (n), of a batch of training text; of the rest of a piece too."""
        found = [self._piece(start, end - at) for start, at, end in self._spans(batch)]
        ids, logp, left = map(torch.cat, zip(*found, strict=True))
        return ids, logp, left

    def known(self, batch: Batch) -> Tensor:
        """(n,) Whether a token has before it, in the batch, all that the teacher had."""
        spans = list(self._spans(batch))
        begins = [bool(self.starts[self._piece_at(start)] == start) for start, _, _ in spans]
        return torch.from_numpy(np.repeat(begins, [end - at for _, at, end in spans]))

    def _spans(self, batch: Batch) -> Iterator[tuple[int, int, int]]:
        """Of each piece in a batch, where it begins in the text, and where it begins and ends in the batch."""
        cuts = batch.cu_seqlens.tolist()
        assert batch.places is not None
        return zip(batch.places.tolist(), cuts[:-1], cuts[1:], strict=True)

    def _piece_at(self, place: int) -> int:
        """Which piece, in reading order, a place in the text is in."""
        return int(self.sorted[np.searchsorted(self.starts, place, side="right", sorter=self.sorted) - 1])

    def _piece(self, start: int, count: int) -> tuple[Tensor, ...]:
        piece = self._piece_at(start)
        number = piece // PIECES
        first = int(self.before[piece] - self.before[number * PIECES]) + start - int(self.starts[piece])
        return tuple(self._file(number).get_slice(name)[first : first + count] for name in NAMES)

    def _file(self, number: int) -> Any:
        if number not in self._open:
            self._open[number] = safe_open(self._path(number), framework="pt")
        return self._open[number]

    def _range(self, number: int) -> tuple[int, int]:
        """The pieces of a file: the first, and the one after the last."""
        return number * PIECES, min((number + 1) * PIECES, self.count)

    def _holds(self, number: int) -> bool:
        if not self._path(number).is_file():
            return False
        first, end = self._range(number)
        return self._file(number).get_slice("left").get_shape()[0] >= self.before[end] - self.before[first]

    @torch.no_grad()
    def _likeliest(self, number: int, teacher: LanguageModel, precision: str) -> Iterator[tuple[Tensor, ...]]:
        tokens = self.shards.tokens(scattered=True)

        def pairs() -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
            for piece in range(*self._range(number)):
                ids = tokens[self.starts[piece] :][: self.lengths[piece]].astype(np.int64)
                yield ids, np.full_like(ids, NO_TARGET)

        for batch in packed(pairs(), self.shards.token_bytes(), TOKENS):
            batch = batch.to(teacher.device)
            with autocast(teacher.device, precision):
                hidden = teacher.features(batch.inputs, cu_seqlens=batch.cu_seqlens)[0][0]
                for rows in hidden.split(ROWS):
                    logp, ids = teacher.head(rows).float().log_softmax(-1).topk(self.top, sorted=True)
                    left = (1 - logp.exp().sum(-1)).clamp(0, 1)
                    yield ids.cpu().to(self.ids_dtype), logp.half().cpu(), left.cpu()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.safetensors"
