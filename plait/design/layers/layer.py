"""What all layer configs share."""

from typing import Any, Self

from plait.design.spec import Memory
from plait.design.spelling import suggest
from plait.design.struct import Struct, convert, positive
from plait.design.weights import Constant, Normal, Weight, Weights, projection, total
from plait.design.wrap import Wrap


class Layer(Struct, frozen=True, kw_only=True):
    """What all layers share. `wrap`: how the layer sits on the stream, where it differs from the design's wrap.

    `shared`: every slot with this letter uses the same weights; norms on the stream and states are each slot's own, and so is
    a low-rank addition to every projection where `adapter_rank` is set (Zamba2, arXiv 2411.15242). adapted: only these have
    one, projections ("up_proj") or parts of one ("q"), each an addition of its own.
    """

    shared: bool = False
    adapter_rank: int | None = None
    adapted: tuple[str, ...] = ()
    wrap: Any = None

    def __post_init__(self) -> None:
        positive(self, "adapter_rank")
        if self.wrap is not None:
            self._set("wrap", convert(self.wrap, Wrap, f"{type(self).__name__}.wrap"))
        if self.adapter_rank and not self.shared:
            raise ValueError(f"{type(self).__name__}.adapter_rank is for layers with shared: true")
        if self.adapted and not self.adapter_rank:
            raise ValueError(f"{type(self).__name__}.adapted says what has additions of adapter_rank, which is not set")

    def resolve(self, dim: int) -> Self:
        """The same config with every derived number filled in for a model of width `dim`."""
        return self

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        """What the resolved layer learns in a model of width `dim`, reading `reads` channels where that is not dim."""
        return ()

    def adapters(self, dim: int, reads: int | None = None) -> Weights:
        """What one use of a shared layer adds: B A x to the projections W x that are adapted, B starting at zero."""
        rank = self.adapter_rank
        if not rank:
            return ()
        matrices = [weight for weight in self.weights(dim, reads) if weight.role == "matrix"]
        known = {_path(weight) for weight in matrices} | {part for weight in matrices for part, _ in weight.parts}
        for name in self.adapted:
            if name not in known:
                raise ValueError(
                    f"{type(self).__name__}.adapted: there is no projection {name!r}; {suggest(name, known)}"
                )
        return tuple(part for weight in matrices for part in adapter(weight, rank, self.adapted))

    def mixing(self, dim: int, context: int) -> int:
        """Forward FLOPs for one token that sees `context` tokens, beside those of the weights' matrices."""
        return 0

    def state(self, dim: int, dtype: str) -> Memory:
        """What the layer remembers of every row in a model of `dtype`."""
        return Memory()

    def parameters(self, dim: int, reads: int | None = None) -> int:
        """Numbers learned by the resolved layer, one use's adapters included."""
        return total(self.weights(dim, reads)) + total(self.adapters(dim, reads))

    def flops(self, dim: int, context: int, reads: int | None = None) -> int:
        """Forward FLOPs for one token that sees `context` tokens (2 per multiply-add)."""
        learned = self.weights(dim, reads) + self.adapters(dim, reads)
        return sum(weight.flops for weight in learned) + self.mixing(dim, context)


class Mixer(Layer, frozen=True, kw_only=True):
    """A layer of heads, whose outputs go through one projection. `out_proj` false leaves that to the merge of a parallel slot,
    which sets it."""

    out_proj: bool = True

    def inner(self) -> int:
        """Channels of the heads' outputs side by side, once the layer is resolved."""
        raise NotImplementedError(f"{type(self).__name__} does not say how wide its heads' outputs are")

    def output(self, name: str, dim: int, bias: bool = False) -> Weights:
        """The output projection, where there is one."""
        return projection(name, dim, self.inner(), bias=bias, writes=True) if self.out_proj else ()


def adapter(weight: Weight, rank: int, adapted: tuple[str, ...]) -> Weights:
    """The low-rank addition to a projection, or those to its parts side by side; none where it is not adapted."""
    name, (rows, columns) = _path(weight), weight.shape
    parts = tuple((part, size) for part, size in weight.parts if part in adapted)
    if adapted and name not in adapted:
        if not parts:
            return ()
        rows = sum(size for _, size in parts)
    else:
        parts = ()
    low = tuple((part, rank) for part, _ in parts)
    down = Weight(f"{name}.adapter_down", (rank * max(1, len(parts)), columns), "matrix", Normal(columns**-0.5), low)
    return down, Weight(f"{name}.adapter_up", (rows, rank), "matrix", Constant(0.0), parts)


def _path(weight: Weight) -> str:
    return weight.name.removesuffix(".weight")


def head_sizes(name: str, dim: int, heads: int | None, head_dim: int | None, default: int) -> tuple[int, int]:
    """heads and head_dim, what is not given derived from dim. `default`: the head_dim where neither is given."""
    if head_dim is None and heads and dim % heads:
        raise ValueError(f"{name}: heads {heads} do not divide dim {dim}; change heads or give head_dim")
    head_dim = head_dim or (dim // heads if heads else default)
    if heads is None and dim % head_dim:
        raise ValueError(f"{name}: dim {dim} is not a multiple of head_dim {head_dim}, so heads must be given")
    return heads or dim // head_dim, head_dim


def divided(name: str, field: str, width: int, parts: int) -> int:
    """width / parts, which a layer's field is derived as."""
    if not width or width % parts:
        raise ValueError(f"{name}: {width} channels do not divide into {parts} equal parts, so {field} must be given")
    return width // parts


def wide_head_dim(dim: int, name: str, field: str = "head_dim") -> int:
    """64, as most small published models; 128 from width 512 on where it divides."""
    if dim % 64:
        raise ValueError(f"{name}: dim {dim} is not a multiple of 64, so heads and {field} must be given")
    return 128 if dim >= 512 and dim % 128 == 0 else 64
