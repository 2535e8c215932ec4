"""From tokens to tokens: one step of rows of a pool, a function of device tensors, and on a GPU a graph that is replayed.

A graph is captured for a number of rows, the bucket; a step of fewer rows fills up with the pool's last row, which is nobody's.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.engine.sampling import GREEDY, Narrowing, Sampler, Sampling
from plait.model.language_model import LanguageModel
from plait.ops.matvec import OneRow
from plait.state import Pool, PoolRows

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MOST = 4 * len(BUCKETS)  # graphs that are kept at a time
WARM_UPS = 2  # runs before a capture: kernels are compiled and libraries make their handles


@dataclass(eq=False)
class Captured:
    """A step as one launch: fill `index`, replay, read `tokens`. `rows`: what `index` is filled with."""

    graph: "torch.cuda.CUDAGraph"
    index: Int[Tensor, " bucket"]
    tokens: Int[Tensor, " bucket"]
    rows: tuple[int, ...] = ()

    def fill(self, at: PoolRows) -> None:
        if at.rows != self.rows:
            self.index.fill_(at.pool.rows)
            self.index[: at.batch] = at.pool.on_device(at.rows)
            self.rows = at.rows


def captures(model: LanguageModel, buckets: Sequence[int] = BUCKETS, length: int = 512) -> list[dict[str, float]]:
    """What `Step` captures on a GPU, by bucket: rows, seconds to capture, milliseconds a step, and bytes of the graph."""
    rows = []
    with torch.inference_mode():
        pool = model.init_pool(max(buckets), length, page=min(length, 256))
        pool.join(model.init_state(max(buckets)))
        step = Step(model, pool, [Sampling()] * max(buckets), range(max(buckets)))
        for bucket in buckets:
            before, started = torch.cuda.memory_reserved(pool.device), time.perf_counter()
            step.warm_up([bucket])
            torch.cuda.synchronize(pool.device)
            captured = time.perf_counter() - started
            times = []
            for _ in range(8):
                started = time.perf_counter()
                step(pool.at(range(bucket))).tolist()
                times.append(1e3 * (time.perf_counter() - started))
            used = max(0, torch.cuda.memory_reserved(pool.device) - before)
            rows.append({"rows": bucket, "capture_s": captured, "step_ms": sorted(times)[4], "bytes": used})
    return rows


class Step:
    """`step(pool.at(rows))` gives these rows' next tokens (b,), having read the last ones. `samplings`, `seeds`: by row."""

    def __init__(
        self,
        model: LanguageModel,
        pool: Pool,
        samplings: Sequence[Sampling],
        seeds: Sequence[int],
        *,
        vocab: int | None = None,
    ):
        self.model, self.pool = model, pool
        self.vocab = vocab or model.design.vocab
        spare = pool.rows + 1 - len(samplings)  # the last row is nobody's
        self.sampler = Sampler([*samplings, *[Sampling()] * spare], [*seeds, *[0] * spare], self.vocab, pool.device)
        self.tokens = torch.zeros(pool.rows + 1, dtype=torch.int64, device=pool.device)
        self.captured: dict[tuple[int, Narrowing], Captured] = {}
        self._tensors = pool.tensors

    def __call__(self, at: PoolRows) -> Int[Tensor, " b"]:
        self.pool.reserve(at.rows, 1)
        tokens = self._replay(at) if self.pool.device.type == "cuda" else self.run(at)
        self.pool.advance(at.rows, 1)
        return tokens

    def run(self, at: PoolRows) -> Int[Tensor, " b"]:
        """The step itself: asks the device nothing."""
        with _products(self.model, at.batch):
            return self.choose(self.model.step(self.tokens[at.index][:, None], at)[:, -1], at)

    def choose(self, hidden: Float[Tensor, "b d"], at: PoolRows) -> Int[Tensor, " b"]:
        """Next tokens from what the head reads."""
        logits = self.model.head(hidden)
        logits = logits if self.vocab == logits.shape[-1] else logits[:, : self.vocab]
        positions = None if self.sampler.narrowing == GREEDY else self.pool.starts[at.index]
        tokens = self.sampler.choose(logits, at.index, positions)
        self.tokens[at.index] = tokens.clamp_min(0)
        return tokens

    def move(self, row: int, to: int) -> None:
        """A row has another place now."""
        self.tokens[to] = self.tokens[row]
        self.sampler.move(row, to)

    def warm_up(self, buckets: Sequence[int] = BUCKETS) -> None:
        """Capture these buckets now, and not when the first step needs one."""
        for bucket in buckets:
            if bucket <= self.pool.rows:
                self._graph(bucket)

    def _replay(self, at: PoolRows) -> Int[Tensor, " b"]:
        captured = self._graph(next(size for size in (*BUCKETS, at.batch) if size >= at.batch))
        captured.fill(at)
        captured.graph.replay()
        return captured.tokens[: at.batch].clone()

    def _graph(self, bucket: int) -> Captured:
        if self._tensors is not self.pool.tensors:  # the pool has grown into others
            self.captured, self._tensors = {}, self.pool.tensors
        key = bucket, self.sampler.narrowing  # what a row that joined later asks for may take other steps
        if key not in self.captured:
            if len(self.captured) >= MOST:
                self.captured.clear()
            self.captured[key] = self._capture(bucket)
        return self.captured[key]

    def _capture(self, bucket: int) -> Captured:
        index = torch.full((bucket,), self.pool.rows, device=self.pool.device)
        at = PoolRows(self.pool, (self.pool.rows,) * bucket, index)
        stream = torch.cuda.Stream(self.pool.device)
        stream.wait_stream(torch.cuda.current_stream(self.pool.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.run(at)
        torch.cuda.current_stream(self.pool.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tokens = self.run(at)
            self.pool.starts[self.pool.rows :] = 0  # nobody's row stays short
        return Captured(graph, index, tokens)


@contextmanager
def _products(model: LanguageModel, rows: int) -> Iterator[None]:
    """Of one row and a matrix: on a GPU the kernel that is as fast as the matrix is read, in bfloat16 on a CPU torch's own,
    as oneDNN's take nearly twice as long (docs/log.md)."""
    mkldnn = torch.backends.mkldnn
    device = model.device.type
    if rows == 1 and device == "cuda":
        with OneRow():
            yield
        return
    if rows > 1 or device != "cpu" or model.dtype != torch.bfloat16 or not mkldnn.enabled:
        yield
        return
    mkldnn.enabled = False
    try:
        yield
    finally:
        mkldnn.enabled = True
