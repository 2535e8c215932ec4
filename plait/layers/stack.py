"""From a design's places to modules: residual sublayers, chains and parallel branches."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import (
    GEGLU,
    GELU,
    GLA,
    HGRN2,
    MLSTM,
    RGLRU,
    RWKV7,
    Attention,
    DeltaNet,
    GatedConv,
    GatedDeltaNet,
    KimiDeltaAttention,
    LatentAttention,
    Layer,
    LightningAttention,
    Linear,
    Mamba,
    Mamba2,
    MixtureOfExperts,
    ReLU2,
    RetNet,
    RWKV7FeedForward,
    SimpleGLA,
    SwiGLU,
)
from plait.design.layers.elementwise import HGRN, MinGRU, MinLSTM
from plait.design.layers.recurrent import GRU, LSTM, RNN, SLSTM
from plait.design.model import ModelConfig
from plait.design.places import Node, ParallelPlace, Place
from plait.design.wrap import Wrap
from plait.layers.attention import AttentionLayer
from plait.layers.context import Context
from plait.layers.declared import LayerModule
from plait.layers.deltanet import DeltaNetLayer
from plait.layers.elementwise import HGRNLayer, MinGRULayer, MinLSTMLayer
from plait.layers.feed_forward import FeedForwardLayer
from plait.layers.gated_conv import GatedConvLayer
from plait.layers.gated_deltanet import GatedDeltaNetLayer
from plait.layers.gla import GLALayer
from plait.layers.hgrn2 import HGRN2Layer
from plait.layers.kimi_delta import KimiDeltaAttentionLayer
from plait.layers.latent_attention import LatentAttentionLayer
from plait.layers.linear import LinearLayer
from plait.layers.mamba import MambaLayer
from plait.layers.mamba2 import Mamba2Layer
from plait.layers.merges import MERGES
from plait.layers.mlstm import MLSTMLayer
from plait.layers.moe import MixtureOfExpertsLayer
from plait.layers.norm import Norm, untouched
from plait.layers.recurrent import RecurrentLayer
from plait.layers.rg_lru import RGLRULayer
from plait.layers.rwkv7 import RWKV7FeedForwardLayer, RWKV7Layer
from plait.layers.scalar_decay import LightningAttentionLayer, RetNetLayer, SimpleGLALayer
from plait.state import Branches, SlotState

LAYERS: dict[type[Layer], type[LayerModule]] = {
    Attention: AttentionLayer,
    LatentAttention: LatentAttentionLayer,
    Mamba: MambaLayer,
    Mamba2: Mamba2Layer,
    GatedDeltaNet: GatedDeltaNetLayer,
    MLSTM: MLSTMLayer,
    RetNet: RetNetLayer,
    LightningAttention: LightningAttentionLayer,
    SimpleGLA: SimpleGLALayer,
    DeltaNet: DeltaNetLayer,
    GLA: GLALayer,
    HGRN2: HGRN2Layer,
    KimiDeltaAttention: KimiDeltaAttentionLayer,
    RWKV7: RWKV7Layer,
    RWKV7FeedForward: RWKV7FeedForwardLayer,
    GatedConv: GatedConvLayer,
    RNN: RecurrentLayer,
    GRU: RecurrentLayer,
    LSTM: RecurrentLayer,
    SLSTM: RecurrentLayer,
    RGLRU: RGLRULayer,
    HGRN: HGRNLayer,
    MinGRU: MinGRULayer,
    MinLSTM: MinLSTMLayer,
    SwiGLU: FeedForwardLayer,
    GEGLU: FeedForwardLayer,
    GELU: FeedForwardLayer,
    ReLU2: FeedForwardLayer,
    Linear: LinearLayer,
    MixtureOfExperts: MixtureOfExpertsLayer,
}

Hidden = Float[Tensor, "b t d"]
# in `context.shared`
GIVEN = "given"  # to the next slot
NEXT = "next"  # the norm that reads the stream after this slot
NORMED = "normed"  # the stream, a norm, and the one normed by the other


class Sublayer(nn.Module):
    """One residual step of the model, keep * x + factor * after(f(norm(x))); `wrap` says which of these there are, and whether
    x is the stream or what the norm made of it. What the slot before it gave to this one is what f reads."""

    norm: Norm | None
    after: Norm | None

    def __init__(self, mixer: nn.Module, wrap: Wrap, dim: int):
        super().__init__()
        self.norm = Norm(wrap.width(dim), wrap.before) if wrap.before else None
        self.mixer = mixer
        self.after = Norm(dim, wrap.after) if wrap.after else None
        self.factor, self.keep = full(wrap.factor), full(wrap.keep)
        self.reads_both, self.onto_normed = wrap.reads == "stream_and_embeddings", wrap.residual == "normed"
        self.gives = wrap.gives

    def forward(self, x: Hidden, context: Context, state: SlotState | None) -> tuple[Hidden, SlotState | None]:
        u = context.shared.get(GIVEN)
        if u is None:
            u = x
        else:
            context.shared[GIVEN] = None
        if self.reads_both:
            u = torch.cat([x, context.shared["x0"]], -1)  # which the model leaves where a slot reads it
        u = u if self.norm is None else normed(self.norm, u, context)
        y, state = self.mixer(u, context, state)
        y = y if context.out is None else context.tap("output", y)
        if self.after is not None or self.factor != 1:
            y = added(y, self.after, self.factor)
        if self.gives != "stream":
            context.shared[GIVEN] = y if self.gives == "next" else x + y
            return x, state
        x = u if self.onto_normed else x
        return summed(x if self.keep == 1 else self.keep * x, y, context), state


def summed(x: Hidden, y: Hidden, context: Context) -> Hidden:
    """x + y, and left in the context what the norm that comes next makes of it, where that is known."""
    norm = context.shared.get(NEXT)
    if norm is None:
        return x + y
    total, after = norm.of_sum(x, y)
    context.shared[NORMED] = total, norm, after
    return total


def normed(norm: Norm, x: Hidden, context: Context) -> Hidden:
    """norm(x), where the slot before has not left it."""
    total, known, after = context.shared.get(NORMED, (None, None, None))
    return after if total is x and known is norm else norm(x)


def announce(slot: nn.Module, norm: nn.Module | None, context: Context) -> None:
    """Tell a slot which norm comes next, so that one kernel adds and norms: for decoding on a GPU, whose steps are many small
    kernels, and where nobody has put anything else in the place of either, or waits for the norm to be called."""
    alone = type(slot) is Sublayer and slot._compiled_call_impl is None
    context.shared[NEXT] = norm if alone and type(norm) is Norm and untouched(norm) else None


def full(factor: float | None) -> float:
    """Of a wrap that the design has resolved."""
    return 1.0 if factor is None else factor


def added(y: Hidden, after: nn.Module | None, factor: float) -> Hidden:
    """What a layer's output adds to its stream."""
    y = y if after is None else after(y)
    return y if factor == 1 else y * factor


class ChainLayer(nn.Module):
    """The layers of one branch. The first reads the branch's (normed) input u; each later one reads the norm of u plus
    what the chain has added so far. The output is what the chain adds."""

    def __init__(self, layers: list[nn.Module], wraps: list[Wrap], dim: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleDict({str(i): Norm(dim, w.before) for i, w in enumerate(wraps) if i and w.before})
        self.after = nn.ModuleDict({str(i): Norm(dim, w.after) for i, w in enumerate(wraps) if w.after})
        self.factors = [full(wrap.factor) for wrap in wraps]

    def forward(self, u: Hidden, context: Context, state: Branches | None) -> tuple[Hidden, Branches | None]:
        states = [None] * len(self.layers) if state is None else state.parts
        norms, posts = dict(self.norms.items()), dict(self.after.items())
        contexts = [context] if len(self.layers) == 1 else [context.inside(i) for i in range(len(self.layers))]
        total, after = None, []
        for i, (layer, here, before) in enumerate(zip(self.layers, contexts, states, strict=True)):
            x = u if total is None else u + total
            y, new = layer(norms[str(i)](x) if str(i) in norms else x, here, before)
            y = added(here.tap("output", y), posts.get(str(i)), self.factors[i])
            total = y if total is None else total + y
            after.append(new)
        assert total is not None  # a chain has a layer
        return total, None if state is None else Branches(tuple(after))


class ParallelLayer(nn.Module):
    """Branches side by side on one normed input, each normed again (unless its merge says otherwise) and merged: what their
    layers give, or at inner their heads."""

    def __init__(self, branches: list[ChainLayer], place: ParallelPlace, design: ModelConfig):
        super().__init__()
        config, widths = place.merge, place.widths(design.dim)
        self.branches = nn.ModuleList(branches)
        self.norms = nn.ModuleList(Norm(width, design.norm) for width in widths) if config.branch_norm else None
        self.merge = MERGES[type(config)](config, design.dim, widths)  # type: ignore[arg-type]  # each its own config

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
    """One `Sublayer` per slot; layers whose config says `shared` have one set of weights per letter."""
    build = _Builder(design)
    return nn.ModuleList(Sublayer(build.node(slot), slot.wrap, design.dim) for slot in design.slots)


def build_layer(place: Place, design: ModelConfig) -> LayerModule:
    """The module of one layer, its weights not drawn yet."""
    module: Any = LAYERS[type(place.layer)]
    return module(place.layer, design)


class _Builder:
    """Modules in reading order, and the first use of every shared letter."""

    def __init__(self, design: ModelConfig):
        self.design = design
        self.shared: dict[str, LayerModule] = {}

    def node(self, node: Node) -> nn.Module:
        if isinstance(node, Place):
            return self.layer(node)
        return ParallelLayer([self.chain(branch) for branch in node.branches], node, self.design)

    def layer(self, place: Place) -> LayerModule:
        if not place.layer.shared:
            return build_layer(place, self.design)
        first = self.shared.get(place.letter)
        if first is not None and not place.layer.adapter_rank:
            return first
        module = build_layer(place, self.design)
        if first is not None:
            module.share(first)
        self.shared.setdefault(place.letter, module)
        module.adapt(self.design)
        return module

    def chain(self, branch: tuple[Node, ...]) -> ChainLayer:
        return ChainLayer([self.node(node) for node in branch], [node.wrap for node in branch], self.design.dim)
