"""Changing layers of a model that is built."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from plait.design import declared
from plait.design.model import ModelConfig
from plait.design.places import Node, ParallelPlace, Place, alike
from plait.design.surgery import with_places
from plait.design.weights import FLOAT32
from plait.design.wrap import Wrap
from plait.layers.merges import MERGES
from plait.layers.norm import Norm
from plait.layers.stack import ChainLayer, ParallelLayer, Sublayer, build_layer
from plait.layers.start import drawn
from plait.model.language_model import LanguageModel


def swap(model: LanguageModel, changes: Mapping[str, Any], *, seed: int = 0) -> LanguageModel:
    """A model with other layers at some addresses: `swap(model, {"A#3": plait.GatedDeltaNet()})`.

    All other modules are the very objects of `model`, which itself stays as it is; new weights are drawn from `seed`, as
    `plait.build` would draw them, in the dtype and on the device of the model. A change is a layer config, a kind's name,
    or a mapping of fields to change; branches side by side, "[D|A]" or a mapping with `branches` and `merge`, of which those
    that stood there keep their modules; at a parallel slot, the address of the one of its layers that stays. Raises
    ValueError for an address, a field or a size that does not exist or fit.
    """
    if not isinstance(changes, Mapping):
        raise ValueError(f"swap takes changes by address, as in {{'A#3': 'gru'}}; got {changes!r}")
    design = with_places(model.design, changes)
    student = copy.copy(model)
    vars(student).update({name: copy.copy(held) for name, held in vars(model).items() if isinstance(held, dict | set)})
    student.design, student.listeners = design, {}
    pairs = zip(model.design.slots, design.slots, model.slots, strict=True)
    student.slots = nn.ModuleList(_Swap(design, model, i, seed).slot(*pair) for i, pair in enumerate(pairs))
    student.slots.training = model.training
    student.max_positions = LanguageModel.limit(design)
    student.reads_embeddings = any(slot.wrap.reads == "stream_and_embeddings" for slot in design.slots)
    return student


Held = tuple[Place, nn.Module]  # a layer of the old model, and its module


def held(node: Node, module: Any) -> list[Held]:
    """The layers that stand in a place: one, or those that are branches by themselves."""
    if isinstance(node, Place):
        return [(node, module)]
    chains = zip(node.branches, module.branches, strict=True)
    return [(b[0], chain.layers[0]) for b, chain in chains if len(b) == 1 and isinstance(b[0], Place)]


def _inner(wrap: Wrap) -> Wrap:
    """What of a wrap is in the layer itself."""
    return Wrap(reads=wrap.reads, value_residual=wrap.value_residual)


class _Swap:
    """One slot of the new model, made of the old one's modules where those stay."""

    def __init__(self, design: ModelConfig, model: LanguageModel, index: int, seed: int):
        self.design, self.seed, self.prefix = design, seed, f"slots.{index}."
        self.device, self.dtype = model.device, model.dtype
        self.training, self.old = model.training, set(model.modules())
        self.weights = {weight.name: weight for weight in declared.weights(design)}

    def slot(self, before: Node, now: Node, module: nn.Module) -> nn.Module:
        assert isinstance(module, Sublayer)
        if _same(before, now):
            return module
        slot = self._like_model(Sublayer(self._node(before, now, module.mixer, "mixer."), now.wrap, self.design.dim))
        if before.wrap.before == now.wrap.before and before.wrap.reads == now.wrap.reads:
            slot.norm = module.norm
        if before.wrap.after == now.wrap.after:
            slot.after = module.after
        return slot.train(self.training)

    def _node(self, before: Node, now: Node, module: Any, path: str) -> nn.Module:
        if _same(before, now):
            return module
        if isinstance(now, Place):
            return self._taken(now, held(before, module)) or self._drawn(build_layer(now, self.design), path)
        if isinstance(before, ParallelPlace) and alike(before, now):
            return self._parallel(before, now, module, path)
        return self._beside(now, held(before, module), path)

    def _beside(self, now: ParallelPlace, there: list[Held], path: str) -> ParallelLayer:
        """Branches where there was a layer, or other branches; one that stood there is the one that did."""
        chains = []
        for b, branch in enumerate(now.branches):
            parts = []
            for i, node in enumerate(branch):
                assert isinstance(node, Place)  # of what `with_places` puts there
                drawn_at = f"{path}branches.{b}.layers.{i}."
                parts.append(self._taken(node, there) or self._drawn(build_layer(node, self.design), drawn_at))
            chains.append(self._like_model(ChainLayer(parts, [node.wrap for node in branch], self.design.dim)))
        parallel = self._like_model(ParallelLayer(chains, now, self.design))
        parallel.merge = self._drawn(parallel.merge, f"{path}merge.")
        return parallel

    def _taken(self, now: Place, there: list[Held]) -> nn.Module | None:
        """The module of an equal layer of those that are there, which is taken out of them."""
        for at, (place, module) in enumerate(there):
            if place.layer.replace(wrap=_inner(place.wrap)) == now.layer.replace(wrap=_inner(now.wrap)):
                del there[at]
                return module
        return None

    def _parallel(self, before: ParallelPlace, now: ParallelPlace, module: ParallelLayer, path: str) -> ParallelLayer:
        chains = []
        modules: Any = module.branches
        for b, (old, new, chain) in enumerate(zip(before.branches, now.branches, modules, strict=True)):
            pairs = zip(old, new, chain.layers, strict=True)
            parts = [self._node(o, n, m, f"{path}branches.{b}.layers.{i}.") for i, (o, n, m) in enumerate(pairs)]
            branch = self._like_model(ChainLayer(parts, [node.wrap for node in new], self.design.dim))
            _keep(branch.norms, chain.norms)
            _keep(branch.after, chain.after)
            chains.append(branch)
        parallel = self._like_model(ParallelLayer(chains, now, self.design))
        if before.merge == now.merge and before.widths(self.design.dim) == now.widths(self.design.dim):
            parallel.norms, parallel.merge = module.norms, module.merge
        else:
            merge: Any = MERGES[type(now.merge)]
            parallel.merge = self._drawn(
                merge(now.merge, self.design.dim, now.widths(self.design.dim)), f"{path}merge."
            )
        return parallel

    def _drawn(self, module: nn.Module, path: str) -> nn.Module:
        """A new layer with weights as `plait.build` would draw them."""
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                weight = self.weights[f"{self.prefix}{path}{name}"]
                dtype = torch.promote_types(self.dtype, torch.float32) if weight.role in FLOAT32 else self.dtype
                parameter.data = drawn(weight, self.seed).to(self.device, dtype)
        return module

    def _like_model(self, module: Any) -> Any:
        """New norms in the model's dtype and on its device; what it is made of is there already."""
        for child in module.modules():
            if isinstance(child, Norm) and child not in self.old:
                child.to(self.device, self.dtype)
        return module


def _keep(new: nn.ModuleDict, old: nn.ModuleDict) -> None:
    for name in new:
        if name in old and new[name].config == old[name].config:
            new[name] = old[name]


def _same(before: Node, now: Node) -> bool:
    """Equal but for their addresses and letters, which count anew."""
    if isinstance(before, Place) or isinstance(now, Place):
        return isinstance(before, Place) and isinstance(now, Place) and before.layer == now.layer
    if not alike(before, now):
        return False
    pairs = [zip(old, new, strict=True) for old, new in zip(before.branches, now.branches, strict=True)]
    parts = all(_same(*pair) for branch in pairs for pair in branch)
    return parts and replace(before, branches=(), address="") == replace(now, branches=(), address="")
