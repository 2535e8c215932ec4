"""Linear recurrences in parallel over time: v_t = J_t v_{t-1} + b_t in about 2 log2 T steps on whole tensors.

Time is the first axis. J is either elementwise, with the shape of b, or a matrix per entry: b (t, *n, m), J (t, *n, m, m).
Both scans here are odd-even: neighbours are merged into half as many steps, those are solved, and the steps between
follow from their left neighbour. Work is twice that of the loop, and only what the answer needs is carried back down.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Parts = tuple[Tensor, ...]
Merge = Callable[[Parts, Parts], Parts]


def matrices(J: Tensor, v: Tensor) -> bool:
    """Whether J holds a matrix for each vector of v, or a number for each number."""
    return J.ndim > v.ndim


def apply(J: Tensor, v: Tensor) -> Tensor:
    """J v."""
    return (J @ v[..., None])[..., 0] if matrices(J, v) else J * v


def shift(v: Tensor) -> Tensor:
    """v_{t-1}, 0 at the start."""
    return torch.cat([torch.zeros_like(v[:1]), v[:-1]])


def finite(x: Tensor) -> Tensor:
    """No infinities and no NaN, and small enough that a product of two is finite: 0 times any of these is 0."""
    bound = torch.finfo(x.dtype).max ** 0.25
    return x.nan_to_num(0.0).clamp(-bound, bound)


def prefixes(merge: Merge, follow: Merge, steps: Parts, kept: int) -> Parts:
    """States after each of `steps` (tuples of tensors, time first), from nothing.

    merge(earlier, later) is the one step that does both; follow(state, step) the state after a step. A state is `kept`
    tensors, and the last so many of a step are the state it leads to from nothing.
    """
    t = len(steps[0])
    if t == 1:
        return steps[-kept:]
    even, odd = tuple(x[0::2] for x in steps), tuple(x[1::2] for x in steps)
    paired = tuple(x[: t // 2] for x in even)
    after = prefixes(merge, follow, merge(paired, odd), kept)
    first = tuple(x[:1] for x in even[-kept:])
    if t > 2:
        rest = follow(tuple(x[: (t - 1) // 2] for x in after), tuple(x[1:] for x in even))
        first = tuple(torch.cat(pair) for pair in zip(first, rest, strict=True))
    return tuple(_interleave(a, b) for a, b in zip(first, after, strict=True))


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    both = even.new_empty(len(even) + len(odd), *even.shape[1:])
    both[0::2], both[1::2] = even, odd
    return both


def scan(J: Tensor, b: Tensor) -> Tensor:
    """v_t = J_t v_{t-1} + b_t with v_{-1} = 0, so that J_0 has no say.

    Products that leave the range of the numbers are cut off, so that they never make a NaN of a zero.
    """

    def merge(earlier: Parts, later: Parts) -> Parts:
        product = later[0] @ earlier[0] if matrices(J, b) else later[0] * earlier[0]
        return finite(product), *follow(earlier[1:], later)

    def follow(state: Parts, step: Parts) -> Parts:
        return (finite(apply(step[0], state[-1]) + step[1]),)

    return prefixes(merge, follow, (finite(J), finite(b)), kept=1)[0]
