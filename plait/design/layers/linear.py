"""One projection and nothing else."""

from plait.design.layers.layer import Layer
from plait.design.weights import Weights, projection


class Linear(Layer, frozen=True, kw_only=True, tag="linear"):
    """W x, token by token: what stands between Zamba2's shared block and the layer that it feeds (arXiv 2411.15242)."""

    bias: bool = False

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        return projection("proj", dim, reads or dim, bias=self.bias, writes=True)
