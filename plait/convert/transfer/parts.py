"""An attention layer's weights by what they are, and the rows of another layer that take them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.norms import RMSNorm
from plait.layers.attention import AttentionLayer
from plait.layers.declared import LayerModule, Projection
from plait.layers.norm import Norm


class Heads(NamedTuple):
    """float64, on the layer's device. What a norm does to queries and keys is in q and k, as far as a matrix can do it. Biases
    are left out: what takes these weights has none."""

    q: Float[Tensor, "h k d"]
    k: Float[Tensor, "g k d"]
    v: Float[Tensor, "g k d"]
    o: Float[Tensor, "dim h*k"] | None

    def spelled_out(self) -> "Heads":
        """Keys and values of a group repeated for each of its query heads."""
        times = len(self.q) // len(self.k)
        return self._replace(k=self.k.repeat_interleave(times, 0), v=self.v.repeat_interleave(times, 0))


def heads_of(old: AttentionLayer) -> Heads:
    c, rows = old.config, old.config.rows()
    q, k, v, *_ = matrix(old.qkv_proj).split_with_sizes([*rows.values()])
    q, k, v = (x.unflatten(0, (-1, c.head_dim)) for x in (q, k, v))
    q, k = _normed(q, old.q_norm), _normed(k, old.k_norm)
    o = getattr(old, old.projection)
    return Heads(q, k, v, None if o is None else matrix(o))


def matrix(projection: nn.Linear) -> Float[Tensor, "o i"]:
    """What a projection multiplies by, with a shared layer's own addition."""
    weight = projection.weight.detach().double()
    if isinstance(projection, Projection) and projection.adapter_down is not None and projection.adapter_up is not None:
        weight = weight + projection.adapter_up.detach().double() @ projection.adapter_down.detach().double()
    return weight


def _normed(x: Float[Tensor, "h k d"], norm: Norm | None) -> Float[Tensor, "h k d"]:
    """Rows as a norm after them leaves them on average, of inputs whose channels are alike and have 1 for mean square: each
    head normed alone, or all as one where the norm is as wide as they are."""
    if norm is None:
        return x
    centred = isinstance(norm.config, RMSNorm) and norm.config.zero_centered
    weight = norm.weight.detach().double() + (1 if centred else 0)
    alone = len(weight) == x.shape[1]
    square = x.square().sum(-1).mean(-1) if alone else x.square().sum(-1).mean().expand(len(x))
    return x * square.rsqrt()[:, None, None] * weight.view(-1, x.shape[1])[..., None]


def fill(projection: nn.Linear, rows: Mapping[str, Float[Tensor, "o i"]]) -> None:
    """Write the named parts of a projection's rows; the others stay as they are."""
    assert isinstance(projection, Projection)
    sizes = dict(projection.parts)
    places = dict(zip(sizes, projection.weight.data.split([*sizes.values()]), strict=True))
    for name, values in rows.items():
        places[name].copy_(values)


def put_output(new: LayerModule, o: Float[Tensor, "dim w"] | None) -> None:
    """Heads' outputs go where they went. Before a merge, which projects, there is nothing to write."""
    name = getattr(type(new), "projection", None)
    projection = getattr(new, name) if name else None
    if projection is not None and o is not None:
        projection.weight.data.copy_(o)


def pass_through(conv: nn.Module | None, tap: float) -> None:
    """A short convolution that gives each token `tap` times itself."""
    if conv is None:
        return
    weight: Tensor = conv.weight.data  # type: ignore[assignment]
    weight.zero_()[:, -1] = tap
    bias = getattr(conv, "bias", None)
    if isinstance(bias, torch.Tensor):
        bias.data.zero_()
