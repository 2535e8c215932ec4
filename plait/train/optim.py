"""Optimizers and the learning rate's schedule."""

import math
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from plait.design import declared
from plait.design.lora import lora_weights
from plait.design.weights import DECAYED, ORTHOGONAL, Weights
from plait.model import LanguageModel
from plait.train.config import RunConfig
from plait.train.muon import Muon
from plait.train.rates import rates

# AdamW's fused kernel exists for these.
FUSED = ("cpu", "cuda")


Named = list[tuple[str, nn.Parameter]]


def all_weights(model: LanguageModel) -> Weights:
    """As declared, additions to them included."""
    own = declared.weights(model.design)
    return own if model.lora is None else (*own, *lora_weights(model.design, model.lora))


def split_parameters(model: LanguageModel, muon: bool) -> dict[str, Named]:
    """Every trained parameter with its name, in exactly one of "muon", "decay" and "plain" (no weight decay).

    What a weight was declared as decides: see `plait.design.weights`. Muon's are the projections and experts in the slots.
    """
    roles = {weight.name: weight.role for weight in all_weights(model)}
    groups: dict[str, Named] = {"muon": [], "decay": [], "plain": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if roles[name] not in DECAYED:
            groups["plain"].append((name, parameter))
        elif muon and roles[name] in ORTHOGONAL and name.startswith("slots."):
            groups["muon"].append((name, parameter))
        else:
            groups["decay"].append((name, parameter))
    return groups


def by_rate(named: Named, rates: dict[str, float]) -> list[tuple[float, Named]]:
    """The parameters that have equal rates together, each group in the model's order; those of rate 0 are left out."""
    moved = sorted((pair for pair in named if rates[pair[0]]), key=lambda pair: rates[pair[0]])
    return [(rate, list(group)) for rate, group in groupby(moved, lambda pair: rates[pair[0]])]


def row_blocks(model: LanguageModel, named: Named) -> list[tuple[int, ...]]:
    """The rows that belong together in each weight: those of q, of k, of v in a fused one, and of every expert anew."""
    parts = {weight.name: weight.parts for weight in all_weights(model)}
    each = [tuple(rows for _, rows in parts[name]) or (parameter.shape[-2],) for name, parameter in named]
    return [rows * parameter.shape[:-2].numel() for rows, (_, parameter) in zip(each, named, strict=True)]


def scale(step: int, run: RunConfig) -> float:
    """The learning rate of step `step` (from 1) as a share of its peak: up in a line, then the schedule's way down."""
    warmup, decay = run.warmup_steps, run.decay_steps
    if step <= warmup:
        return step / warmup
    if run.schedule == "cosine":
        done = (step - warmup) / (run.steps - warmup)
        return run.lr_end + (1 - run.lr_end) * (1 + math.cos(math.pi * done)) / 2
    left = (run.steps - step) / decay if step > run.steps - decay else 1.0
    return run.lr_end + (1 - run.lr_end) * left


class Optimizers:
    """AdamW, and Muon beside it where the run says so, as one."""

    def __init__(self, model: LanguageModel, run: RunConfig):
        groups = split_parameters(model, muon=run.optimizer == "muon")
        by_name, fused = rates(model, run.rates), model.device.type in FUSED
        adamw = [
            {"params": named, "rate": rate, "weight_decay": decay}
            for what, decay in (("decay", run.weight_decay), ("plain", 0.0))
            for rate, named in by_rate(groups[what], by_name)
        ]
        self.run, self.fused, self.frozen = run, fused, {name for name, rate in by_name.items() if not rate}
        self.all: list[Any] = []
        if adamw:  # none where additions alone are trained, by Muon
            self.all.append(torch.optim.AdamW(adamw, lr=run.lr, betas=run.betas, fused=fused))
        matrices = [
            {"params": named, "rate": rate, "blocks": row_blocks(model, named)}
            for rate, named in by_rate(groups["muon"], by_name)
        ]
        if matrices:
            self.all.append(Muon(matrices, lr=run.lr, weight_decay=run.weight_decay))
        if not self.all:
            raise ValueError("rates: every weight's is 0, so nothing is trained")

    def step(self, step: int, broken: Tensor | None = None) -> float:
        """Update the weights at step `step`'s learning rate, which is returned, and drop the gradients.

        broken: a number on the device; above 0 all weights stay as they are, and nobody has to wait to know.
        """
        lr = self.run.lr * scale(step, self.run)
        skip = (
            broken is not None and not self.fused and bool(broken > 0)
        )  # torch's other forms cannot decide on the device
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["rate"]
            optimizer.found_inf = broken if self.fused else None
            if not skip:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return lr

    def tensors(self) -> dict[str, torch.Tensor]:
        """The whole state by `PARAMETER.WHAT`. Hyperparameters are not in it: the run says them."""
        flat = {}
        for optimizer in self.all:
            for group in optimizer.param_groups:
                for name, parameter in zip(group["param_names"], group["params"], strict=True):
                    flat |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
        return flat

    def load_tensors(self, flat: dict[str, torch.Tensor]) -> None:
        """What `tensors` gave; weights may have been frozen since. Raises ValueError for a tensor of an unknown parameter."""
        by_name: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in flat.items():
            name, _, what = key.rpartition(".")
            by_name.setdefault(name, {})[what] = value
        for optimizer in self.all:
            names = [name for group in optimizer.param_groups for name in group["param_names"]]
            state = {index: by_name.pop(name) for index, name in enumerate(names) if name in by_name}
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        if unknown := by_name.keys() - self.frozen:
            raise ValueError(f"optimizer state for {min(unknown)!r}, which is no parameter of this run")
