"""Weights whose rate is 0 stay as they are, over a stop too, and are trainable again afterwards."""

import pytest
import torch

from plait.model import build
from plait.train import Interrupted, train


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_weights_stay_and_the_others_move(make_run, quiet, interrupt_once, optimizer):
    run = make_run("DF AF", rates={"*": 0, "D": 1}, optimizer=optimizer, sample_every=6)
    whole = train(run.replace(folder=run.folder + "-whole"), sample=lambda *_: f"{torch.rand(1).item()}", console=quiet)
    with pytest.raises(Interrupted):
        train(run, sample=interrupt_once(), console=quiet)
    parts = train(run, sample=lambda *_: f"{torch.rand(1).item()}", console=quiet)
    first = dict(build(whole.model.design, seed=run.seed).named_parameters())
    for (name, one), other in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, first[name]) is not name.startswith("slots.0.mixer."), name
        assert one.requires_grad


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_are_frozen_and_thawed_on_the_way(make_run, quiet, optimizer):
    run = make_run("DF AF", optimizer=optimizer, steps=4)
    before = train(run, console=quiet).model
    frozen = train(run.replace(steps=6, rates={"D": 0}, resume=True), console=quiet).model
    thawed = train(run.replace(steps=8, resume=True), console=quiet).model
    for (name, one), two, three in zip(
        before.named_parameters(), frozen.parameters(), thawed.parameters(), strict=True
    ):
        assert torch.equal(one, two) is name.startswith("slots.0.mixer."), name
        assert not torch.equal(two, three), name
