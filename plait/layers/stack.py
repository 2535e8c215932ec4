"""From a design's slots to modules: residual sublayers, chains and parallel branches."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import GELU, Attention, GatedDeltaNet, Layer, Mamba2, ReLU2, SwiGLU
from plait.design.model import ModelConfig
from plait.design.pattern import Chain, Item, Parallel
from plait.design.recurrent import GRU, LSTM, RNN, SLSTM
from plait.layers.attention import AttentionLayer
from plait.layers.context import Context
from plait.layers.feed_forward import FeedForwardLayer
from plait.layers.gated_deltanet import GatedDeltaNetLayer
from plait.layers.mamba2 import Mamba2Layer
from plait.layers.merge import MERGES
from plait.layers.norm import Norm
from plait.layers.recurrent import RecurrentLayer
from plait.state import Branches, SlotState

LAYERS: dict[type[Layer], Callable[..., nn.Module]] = {
    Attention: AttentionLayer,
    Mamba2: Mamba2Layer,
    GatedDeltaNet: GatedDeltaNetLayer,
    RNN: RecurrentLayer,
    GRU: RecurrentLayer,
    LSTM: RecurrentLayer,
    SLSTM: RecurrentLayer,
    SwiGLU: FeedForwardLayer,
    GELU: FeedForwardLayer,
    ReLU2: FeedForwardLayer,
}

Hidden = Float[Tensor, "b t d"]


class Sublayer(nn.Module):
    """One residual step of the model, x + f(norm(x))."""

    def __init__(self, mixer: nn.Module, design: ModelConfig):
        super().__init__()
        self.norm = Norm(design.dim, design.norm)
        self.mixer = mixer

    def forward(self, x: Hidden, context: Context, state: SlotState | None) -> tuple[Hidden, SlotState | None]:
        y, state = self.mixer(self.norm(x), context, state)
        return x + y, state


class ChainLayer(nn.Module):
    """The layers of one branch. The first reads the branch's (normed) input u; each later one reads the norm of u plus
    what the chain has added so far. The output is what the chain adds."""

    def __init__(self, layers: list[nn.Module], design: ModelConfig):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(Norm(design.dim, design.norm) for _ in layers[1:])

    def forward(self, u: Hidden, context: Context, state: Branches | None) -> tuple[Hidden, Branches | None]:
        states = [None] * len(self.layers) if state is None else state.parts
        contexts = [context] if len(self.layers) == 1 else [context.inside(i) for i in range(len(self.layers))]
        total, first = self.layers[0](u, contexts[0], states[0])
        after = [first]
        for norm, layer, here, before in zip(self.norms, list(self.layers)[1:], contexts[1:], states[1:], strict=True):
            y, new = layer(norm(u + total), here, before)
            total = total + y
            after.append(new)
        return total, None if state is None else Branches(tuple(after))


class ParallelLayer(nn.Module):
    """Branches side by side on one normed input, each normed again (unless told otherwise) and merged."""

    def __init__(self, branches: list[ChainLayer], item: Parallel, design: ModelConfig):
        super().__init__()
        config = design.merge_of(item)
        self.branches = nn.ModuleList(branches)
        self.norms = nn.ModuleList(Norm(design.dim, design.norm) for _ in branches) if config.branch_norm else None
        self.merge = MERGES[type(config)](config, design.dim, len(branches))

    def forward(self, u: Hidden, context: Context, state: Branches | None) -> tuple[Hidden, Branches | None]:
        states = [None] * len(self.branches) if state is None else state.parts
        outputs, after = [], []
        for i, (branch, before) in enumerate(zip(self.branches, states, strict=True)):
            y, new = branch(u, context.inside(i), before)
            outputs.append(y)
            after.append(new)
        if self.norms is not None:
            outputs = [norm(y) for norm, y in zip(self.norms, outputs, strict=True)]
        return self.merge(u, outputs), None if state is None else Branches(tuple(after))


def build_stack(design: ModelConfig) -> nn.ModuleList:
    """One `Sublayer` per slot; layers whose config says `shared` are built once per letter."""
    shared: dict[str, nn.Module] = {}

    def layer(item: Item) -> nn.Module:
        if isinstance(item, Parallel):
            return ParallelLayer([chain(branch) for branch in item.branches], item, design)
        config = design.bound[item.name]
        if config.shared and item.name in shared:
            return shared[item.name]
        module = LAYERS[type(config)](config, design)
        if config.shared:
            shared[item.name] = module
        return module

    def chain(items: Chain) -> ChainLayer:
        return ChainLayer([layer(item) for item in items], design)

    return nn.ModuleList(Sublayer(layer(slot.item), design) for slot in design.slots)
