"""Activations that are computed again are those that were: no gradient changes, and less is kept."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import plait
from plait.evaluate.laws import DESIGNS
from plait.evaluate.laws.compare import some_tokens, subject
from plait.model.recompute import PRODUCTS, recomputed
from plait.ops.operator import CHEAP

CHOICES = (False, "cheap", True)
# Gradients of a weight used more than once are summed in bfloat16 where autocast casts it once, else in float32: 8 bits.
ROUNDING = 2.0**-8


def gradients(model, tokens, choice, cu_seqlens=None, autocast=False):
    model.zero_grad()
    model.activation_checkpointing = choice
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(tokens, cu_seqlens=cu_seqlens)[0]
    outputs.float().square().mean().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("design", [pytest.param(design, id=name) for name, design in DESIGNS.items()])
def test_no_gradient_changes(design):
    model, tokens = subject(design, "cpu", torch.float32), some_tokens(design, 70, "cpu")[None]
    cuts = torch.tensor([0, 1, 40, 70], dtype=torch.int32)
    for documents, autocast in ((None, False), (cuts, False), (cuts, True)):
        kept, *again = (gradients(model, tokens, choice, documents, autocast) for choice in CHOICES)
        for choice, found in zip(CHOICES[1:], again, strict=True):
            for (name, _), got, want in zip(model.named_parameters(), found, kept, strict=True):
                assert (got is None) == (want is None), (choice, name)
                if got is not None and not torch.equal(got, want):
                    assert autocast and choice == "cheap", (choice, name)
                    assert (got - want).abs().max() <= ROUNDING * want.abs().max(), (choice, name)


def held(model, tokens) -> int:
    """Bytes that a forward pass leaves behind for the backward one."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        outputs = model(tokens)[0]
    assert outputs.requires_grad
    return sum(event.self_cpu_memory_usage for event in seen.key_averages())


@pytest.mark.parametrize("pattern", ["AF", "DF", "MF", "GF", "[K|A]F", "LE"])
def test_less_is_kept(pattern):
    model = plait.build(plait.ModelConfig(vocab=7, dim=128, pattern=f"({pattern})2"))
    tokens = torch.arange(512).view(2, 256) % 7
    found = []
    for choice in CHOICES:
        model.activation_checkpointing = choice
        found.append(held(model, tokens))
    everything, products, inputs = found
    assert inputs < products / 2
    assert products < 0.9 * everything
    if pattern in ("DF", "MF", "[K|A]F"):  # the more gates, norms and scaled copies there are
        assert products < 0.6 * everything


@pytest.mark.parametrize("pattern", ["G", "H S", "[N|A]F"])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_forward_pass_runs_each_slot_once(pattern, choice):
    """A solver takes derivatives inside of its forward pass, of which checkpointing must know nothing."""
    layers = {"N": plait.RNN()} if "N" in pattern else {}
    model = plait.build(plait.ModelConfig(vocab=7, dim=64, pattern=pattern, layers=layers))
    model.activation_checkpointing, calls = choice, []
    for slot in model.slots:
        slot.mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    loss = model(torch.arange(100)[None] % 7)[0].square().mean()
    assert len(calls) == len(model.slots)
    loss.backward()
    assert len(calls) == len(model.slots) * (2 if choice else 1)


def test_compiled_slots_are_left_to_the_compiler():
    slot = torch.nn.Linear(2, 2)
    assert recomputed("cheap", slot) is not None
    slot.compile(backend="eager")
    assert recomputed("cheap", slot) is None
    assert recomputed(True, slot) is not None
    with torch.no_grad():
        assert recomputed(True, slot) is None


def test_the_names_exist():
    for name in (*PRODUCTS, *(f"plait::{name}" for name in CHEAP)):
        space, operator = name.split("::")
        assert hasattr(getattr(torch.ops, space), operator)


def test_a_choice_that_is_none():
    model = plait.build(plait.ModelConfig(vocab=7, dim=64, pattern="AF"))
    model.activation_checkpointing = "all"
    with pytest.raises(ValueError, match="activation_checkpointing is True, False or 'cheap'; got 'all'"):
        model(torch.zeros(1, 3, dtype=torch.long))
