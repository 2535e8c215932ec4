"""Parameters, FLOPs and state bytes of a design, counted without building it (tests hold them against the real thing)."""

from collections.abc import Callable
from dataclasses import dataclass

from plait.design.layers import Layer
from plait.design.model import ModelConfig
from plait.design.pattern import Chain, Item, Letter
from plait.design.spec import StateSpec


@dataclass(frozen=True, slots=True)
class SlotCount:
    """One row of `plait show`. Shared weights are counted where they first appear."""

    address: str
    layer: str
    parameters: int
    flops: int
    state_bytes: int


def state_spec(design: ModelConfig, batch: int = 1, length: int = 0, dtype: str = "float32") -> StateSpec:
    """The state of the whole model: one branch per slot."""
    return StateSpec(
        "model", branches=tuple(_item_state(design, slot.item, batch, length, dtype) for slot in design.slots)
    )


def _item_state(design: ModelConfig, item: Item, batch: int, length: int, dtype: str) -> StateSpec:
    if isinstance(item, Letter):
        return design.bound[item.name].state(design.dim, batch, length, dtype)
    chains = (
        StateSpec("chain", branches=tuple(_item_state(design, part, batch, length, dtype) for part in branch))
        for branch in item.branches
    )
    return StateSpec("parallel", branches=tuple(chains))


def slot_counts(design: ModelConfig, context: int, dtype: str = "float32") -> list[SlotCount]:
    """Per slot: parameters, forward FLOPs per token at `context` tokens, and state bytes of one sequence that long."""
    rows, seen = [], set()

    def fresh(name: str, layer: Layer) -> int:
        if layer.shared and name in seen:
            return 0
        seen.add(name)
        return layer.parameters(design.dim)

    for slot in design.slots:
        parameters = design.dim + _item_sum(design, slot.item, fresh) + _glue_parameters(design, slot.item)
        flops = _item_sum(design, slot.item, lambda _, layer: layer.flops(design.dim, context))
        state = _item_state(design, slot.item, 1, context, dtype).nbytes
        name = (
            type(design.bound[slot.item.name]).__name__
            if isinstance(slot.item, Letter)
            else _merge_name(design, slot.item)
        )
        rows.append(SlotCount(slot.address, name, parameters, flops + 2 * _glue_matrix(design, slot.item), state))
    return rows


def _merge_name(design: ModelConfig, item: Item) -> str:
    assert not isinstance(item, Letter)
    layers = ["+".join(_layer_names(design, branch)) for branch in item.branches]
    return f"{' | '.join(layers)}, {type(design.merge_of(item)).__name__}"


def _layer_names(design: ModelConfig, chain: Chain) -> list[str]:
    return [
        type(design.bound[i.name]).__name__ if isinstance(i, Letter) else f"[{_merge_name(design, i)}]" for i in chain
    ]


def _item_sum(design: ModelConfig, item: Item, value: Callable[[str, Layer], int]) -> int:
    if isinstance(item, Letter):
        return value(item.name, design.bound[item.name])
    return sum(_item_sum(design, part, value) for branch in item.branches for part in branch)


def _glue_parameters(design: ModelConfig, item: Item) -> int:
    """Norms inside branches and the merge's own weights."""
    if isinstance(item, Letter):
        return 0
    merge, n = design.merge_of(item), len(item.branches)
    own = merge.parameters(design.dim, n) + n * design.dim * merge.branch_norm
    inner_norms = sum((len(branch) - 1) * design.dim for branch in item.branches)
    return own + inner_norms + sum(_glue_parameters(design, part) for branch in item.branches for part in branch)


def _glue_matrix(design: ModelConfig, item: Item) -> int:
    if isinstance(item, Letter):
        return 0
    inner = sum(_glue_matrix(design, part) for branch in item.branches for part in branch)
    return design.merge_of(item).matrix(design.dim, len(item.branches)) + inner


def parameters(design: ModelConfig) -> int:
    """All weights, each once."""
    embeddings = design.vocab * design.dim * (1 if design.tie_embeddings else 2)
    return embeddings + design.dim + sum(row.parameters for row in slot_counts(design, context=1))


def flops_per_token(design: ModelConfig, context: int) -> int:
    """Forward matrix-multiply FLOPs for one token that sees `context` tokens; training costs three times as many."""
    return 2 * design.vocab * design.dim + sum(row.flops for row in slot_counts(design, context))


def state_bytes(design: ModelConfig, context: int, dtype: str = "float32") -> int:
    """What one sequence of `context` tokens leaves behind."""
    return state_spec(design, 1, context, dtype).nbytes
