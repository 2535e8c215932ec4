"""The processes that train one model together, each a rank: what they decide and count, they decide and count as one.

Every rank calls these in the same order with its own values and gets the same answer.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plait.layers import Channels
from plait.layers.channels import JOIN, Reduction
from plait.train.late import leaves, rebuilt


class Ranks(Protocol):
    """`rank` of `size`; rank 0 writes what a run leaves on disk."""

    rank: int
    size: int

    def sum(self, *numbers: int) -> tuple[int, ...]:
        """Each number summed over the ranks, on the host."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        ...

    def reduce(self, tensors: list[Tensor], reduction: Reduction) -> list[Tensor]:
        """Tensors reduced over the ranks; a maximum takes NaN for infinity. Waits for no device."""
        ...

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every rank's gradients become their sum. A parameter without one on any rank has none: no optimizer decays it."""
        ...

    def in_turn(self) -> AbstractContextManager[Any]:
        """Rank 0 does what is inside before the others do: they find the files that it writes."""
        ...


class One:
    """A process on its own."""

    rank, size = 0, 1

    def sum(self, *numbers: int) -> tuple[int, ...]:
        return numbers

    def any(self, flag: bool) -> bool:
        return flag

    def reduce(self, tensors: list[Tensor], reduction: Reduction) -> list[Tensor]:
        return tensors

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        pass

    def in_turn(self) -> AbstractContextManager[Any]:
        return nullcontext()


class Distributed:
    """The ranks of torch.distributed, whose process group has been made (`torchrun`, `init_process_group`).

    What is decided on the host goes through gloo, so that no device is asked.
    """

    def __init__(self) -> None:
        if not dist.is_initialized():
            raise ValueError("no process group: call torch.distributed.init_process_group first, under torchrun")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.host: Any = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def sum(self, *numbers: int) -> tuple[int, ...]:
        total = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        dist.all_reduce(total, group=self.host)
        return tuple(total.tolist())

    def any(self, flag: bool) -> bool:
        return self.sum(int(flag))[0] > 0

    def reduce(self, tensors: list[Tensor], reduction: Reduction) -> list[Tensor]:
        if not tensors:
            return tensors
        flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
        if reduction == "max":
            flat = flat.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        dist.all_reduce(flat, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[reduction])
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        learned = [parameter for parameter in parameters if parameter.requires_grad]
        used = self.sum(*(int(parameter.grad is not None) for parameter in learned))
        waiting = []
        for parameter, ranks in zip(learned, used, strict=True):
            if not ranks:
                continue
            if parameter.grad is None:  # unused here, but not everywhere
                parameter.grad = torch.zeros_like(parameter)
            waiting.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in waiting:
            work.wait()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        if self.rank:
            dist.barrier(self.host)
        try:
            yield
        finally:
            if not self.rank:
                dist.barrier(self.host)


def reduce_stats(channels: Channels, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """The stats of this rank's tokens become those of all ranks'."""
    if ranks.size == 1:
        return channels.stats
    reduced: dict[str, dict[str, Any]] = {address: {} for address in channels.stats}
    for reduction in JOIN:
        for address, own in channels.stats.items():
            mine = {name: value for name, value in own.items() if channels.reductions[name] == reduction}
            reduced[address] |= rebuilt(mine, iter(ranks.reduce(list(leaves(mine)), reduction)))
    return reduced
