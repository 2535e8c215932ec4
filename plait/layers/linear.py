"""One projection and nothing else."""

from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import Linear
from plait.layers.context import Context
from plait.layers.declared import LayerModule
from plait.state import Nothing


class LinearLayer(LayerModule):
    """W x."""

    config: Linear
    proj: nn.Linear

    def forward(
        self, x: Float[Tensor, "b t d"], context: Context, state: Nothing | None
    ) -> tuple[Float[Tensor, "b t d"], Nothing | None]:
        return self.proj(x), state
