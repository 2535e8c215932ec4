"""Parameters, FLOPs and state bytes of a design, counted without building it (tests hold them against the real thing)."""

from dataclasses import dataclass

from plait.design import declared
from plait.design.model import ModelConfig
from plait.design.places import Node, Place
from plait.design.spec import BYTES, Memories, Memory, StateSpec
from plait.design.weights import FLOAT32, active, total


@dataclass(frozen=True, slots=True)
class SlotCount:
    """One row of `plait show`. Shared weights are counted where they first appear."""

    address: str
    layer: str
    parameters: int
    flops: int
    state_bytes: int


def state_spec(design: ModelConfig, batch: int = 1, length: int = 0, dtype: str = "float32") -> StateSpec:
    """The state of the whole model: one branch per slot. Meta tokens, which stand before every text, are in it."""
    return memory(design, dtype).sized(batch, length + design.front.meta if length else 0)


def memory(design: ModelConfig, dtype: str = "float32") -> Memories:
    """What every slot remembers."""
    return Memories(tuple(_memory(design, slot, dtype) for slot in design.slots))


def _memory(design: ModelConfig, node: Node, dtype: str) -> Memory | Memories:
    if isinstance(node, Place):
        return node.layer.state(design.dim, dtype)
    return Memories(tuple(Memories(tuple(_memory(design, part, dtype) for part in branch)) for branch in node.branches))


def slot_counts(design: ModelConfig, context: int, dtype: str = "float32") -> list[SlotCount]:
    """Per slot: parameters, forward FLOPs per token at `context` tokens, and state bytes of one sequence that long."""
    learned = declared.slot_weights(design)
    return [
        SlotCount(
            slot.address,
            describe(slot),
            total(own),
            _flops(design, slot, context),
            _memory(design, slot, dtype).sized(1, context).nbytes,
        )
        for slot, own in zip(design.slots, learned, strict=True)
    ]


def describe(node: Node) -> str:
    """The layer's name, or those of the branches and of their merge."""
    if isinstance(node, Place):
        return type(node.layer).__name__
    branches = ("+".join(_inside(part) for part in branch) for branch in node.branches)
    return f"{' | '.join(branches)}, {type(node.merge).__name__}"


def _inside(node: Node) -> str:
    return describe(node) if isinstance(node, Place) else f"[{describe(node)}]"


def _flops(design: ModelConfig, node: Node, context: int) -> int:
    if isinstance(node, Place):
        return node.layer.flops(design.dim, context, node.wrap.width(design.dim))
    widths, parts = node.widths(design.dim), (part for branch in node.branches for part in branch)
    merge = sum(weight.flops for weight in node.merge.learned(design.dim, widths)) + node.merge.mixing(widths)
    return merge + sum(_flops(design, part, context) for part in parts)


def parameters(design: ModelConfig) -> int:
    """All weights, each once."""
    return total(declared.weights(design))


def active_parameters(design: ModelConfig) -> int:
    """Those that a token passes through: of experts, those that are chosen."""
    return active(declared.weights(design))


def head_flops(design: ModelConfig) -> int:
    return 2 * design.dim * design.head.rows(design.vocab)


def flops_per_token(design: ModelConfig, context: int) -> int:
    """Forward matrix-multiply FLOPs for one token that sees `context` tokens; training costs three times as many."""
    front = sum(weight.flops for weight in declared.front_weights(design))
    return front + head_flops(design) + sum(row.flops for row in slot_counts(design, context))


def state_bytes(design: ModelConfig, context: int, dtype: str = "float32") -> int:
    """What one sequence of `context` tokens leaves behind."""
    return state_spec(design, 1, context, dtype).nbytes


def weights_read(design: ModelConfig, batch: int, dtype: str = "float32") -> int:
    """Bytes of the weights that one token each of `batch` sequences is multiplied with, each once: without tables of which rows
    are looked up, but for one that is the head's too; of experts, as many as the tokens choose at most."""
    read = 0
    for weight in declared.weights(design):
        if weight.role == "embedding" and not (design.tied and weight.name == "embed.weight"):
            continue
        width = max(BYTES[dtype], BYTES["float32"]) if weight.role in FLOAT32 else BYTES[dtype]
        read += round(weight.numel * min(1.0, batch * weight.used)) * width
    return read


def transformer_beside(design: ModelConfig) -> ModelConfig | None:
    """What to compare with: attention and SwiGLU in as many slots, as wide, between the same front and head. None where a width
    has no default heads."""
    blocks = -(-len(design.slots) // 2)
    try:
        return ModelConfig(
            vocab=design.vocab,
            dim=design.dim,
            pattern=f"(AF){blocks}",
            norm=design.norm,
            front=design.front,
            head=design.head,
            tie_embeddings=design.tie_embeddings,
        )
    except ValueError:
        return None
