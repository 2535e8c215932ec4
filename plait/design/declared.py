"""Every weight of a design by its full name, as the model's modules carry it: "slots.3.mixer.qkv_proj.weight"."""

from dataclasses import replace

from plait.design.model import ModelConfig
from plait.design.norms import RMSNorm
from plait.design.places import Node, Place, prefixed
from plait.design.weights import Constant, Normal, Weight, Weights


def weights(design: ModelConfig) -> Weights:
    """All weights, each once, with starts that know the model's depth and norm."""
    learned = (
        *front_weights(design),
        *(weight for slot in slot_weights(design) for weight in slot),
        *head_weights(design),
    )
    return tuple(_started(weight, design) for weight in learned)


def front_weights(design: ModelConfig) -> Weights:
    normed = design.norm.weights("embed_norm", design.dim) if design.front.norm else ()
    return (*design.front.weights(design.dim, design.vocab), *normed)


def head_weights(design: ModelConfig) -> Weights:
    return (*design.norm.weights("norm", design.dim), *design.head.weights(design.dim, design.vocab, design.tied))


def slot_weights(design: ModelConfig) -> list[Weights]:
    """Slot by slot; shared weights where they first appear."""
    uses: set[str] = set()
    return [_slot(design, node, f"slots.{i}.", uses) for i, node in enumerate(design.slots)]


def lora_targets(design: ModelConfig) -> list[str]:
    """The modules for PEFT's `LoraConfig(target_modules=...)`: every projection of every layer and merge.

    Left out are what PEFT cannot wrap (role "blocks": projections within heads, recurrent matrices, a merge's gate), shared
    layers with additions of each use, whose one matrix could not take all of them in a merge, and the two ends: "lm_head" may
    be added where the head has a matrix of its own.
    """
    weights = (weight for slot in slot_weights(design) for weight in slot)
    matrices = [weight.name.rpartition(".") for weight in weights if weight.role == "matrix"]
    apart = tuple(prefix for prefix, place in prefixed(design.slots) if place.layer.adapter_rank)
    return [module for module, _, leaf in matrices if leaf == "weight" and not module.startswith(apart)]


def _slot(design: ModelConfig, node: Node, name: str, uses: set[str]) -> Weights:
    wrap = node.wrap
    before = wrap.before.weights(f"{name}norm", wrap.width(design.dim)) if wrap.before else ()
    after = wrap.after.weights(f"{name}after", design.dim) if wrap.after else ()
    return (*before, *_node(design, node, f"{name}mixer.", uses), *after)


def _node(design: ModelConfig, node: Node, name: str, uses: set[str]) -> Weights:
    if isinstance(node, Place):
        return _layer(design, node, name, uses)
    branches = [_branch(design, part, f"{name}branches.{b}.", uses) for b, part in enumerate(node.branches)]
    normed = range(len(node.branches)) if node.merge.branch_norm else ()
    widths = node.widths(design.dim)
    norms = [design.norm.weights(f"{name}norms.{b}", widths[b]) for b in normed]
    merge = tuple(weight.inside(f"{name}merge.") for weight in node.merge.learned(design.dim, widths))
    return tuple(weight for group in (*branches, *norms, merge) for weight in group)


def _layer(design: ModelConfig, place: Place, name: str, uses: set[str]) -> Weights:
    layer, reads = place.layer, place.wrap.width(design.dim)
    own = () if layer.shared and place.letter in uses else layer.weights(design.dim, reads)
    if layer.shared:  # not where `at` puts another layer
        uses.add(place.letter)
    return tuple(weight.inside(name) for weight in (*own, *layer.adapters(design.dim, reads)))


def _branch(design: ModelConfig, chain: tuple[Node, ...], name: str, uses: set[str]) -> Weights:
    """A chain's layers; each but the first reads through a norm of its own."""
    learned: list[Weight] = []
    for i, node in enumerate(chain):
        learned += _node(design, node, f"{name}layers.{i}.", uses)
        if i and node.wrap.before:
            learned += node.wrap.before.weights(f"{name}norms.{i}", design.dim)
        if node.wrap.after:
            learned += node.wrap.after.weights(f"{name}after.{i}", design.dim)
    return tuple(learned)


def _started(weight: Weight, design: ModelConfig) -> Weight:
    """Norms start as the design's do; what writes into the residual stream starts smaller by sqrt(slots), so that the
    stream's variance does not grow with depth."""
    if weight.start is None:
        centred = isinstance(design.norm, RMSNorm) and design.norm.zero_centered
        return replace(weight, start=Constant(0.0 if centred else 1.0))
    if weight.writes and isinstance(weight.start, Normal):
        return replace(weight, start=Normal(weight.start.std * len(design.slots) ** -0.5))
    return weight
