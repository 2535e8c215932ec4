"""Experts in training: loads in the log, biases that even them out, and Muon on every expert alone."""

import pytest
import torch

import plait
from plait.train import RunConfig, checkpoints, train
from plait.train.balance import rebalance
from plait.train.metrics import read_metrics
from plait.train.muon import orthogonal
from plait.train.optim import Optimizers, row_blocks, split_parameters

EXPERTS, RATE = 6, 0.01


def design(pattern="EA", rate=RATE, **changes):
    layer = {"kind": "moe", "experts": EXPERTS, "top_k": 2, "hidden": 16, "bias_rate": rate} | changes
    return {"dim": 64, "pattern": pattern, "layers": {"E": layer}}


def biases(run):
    """What each step moved the biases by, from the loads that the log has."""
    total = torch.zeros(EXPERTS)
    for record in read_metrics(run / "metrics.jsonl"):
        if "stats" in record:
            load = torch.tensor(record["stats"]["E#0"]["load"])
            total += RATE * torch.sign(load.mean() - load)
    return total


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"activation_checkpointing": True}])
def test_biases_follow_the_loads_of_whole_steps(make_run, quiet, changes):
    run = make_run(design=design(), steps=4, eval_every=0, **changes)
    result = train(run, console=quiet)
    records = [record for record in result.history if "stats" in record]
    tokens = [sum(record["stats"]["E#0"]["load"]) for record in records]
    assert tokens == [2 * 4 * 32] * 4  # every token has two experts
    assert all({"balance", "router_z"} < set(record["losses"]) for record in records)
    bias = result.model.slots[0].mixer.router_bias
    torch.testing.assert_close(bias.data, biases(result.folder))
    assert bias.abs().max() > 0


def test_a_step_that_is_not_finite_moves_no_bias():
    model = plait.build({"vocab": 61} | design())
    loads = {"E#0": {"load": torch.tensor([9, 0, 0, 0, 0, 3])}}
    rebalance(model, loads, torch.ones(()))
    bias = model.slots[0].mixer.router_bias
    assert not bias.any()
    rebalance(model, loads, torch.zeros(()))
    torch.testing.assert_close(bias.data, RATE * torch.tensor([-1.0, 1, 1, 1, 1, -1]))


def test_the_uses_of_a_shared_layer_are_one_load():
    model = plait.build({"vocab": 61} | design("EAE", shared=True))
    loads = {f"E#{i}": {"load": torch.tensor([6 * (1 - i), 6 * i, 0, 0, 9, 9])} for i in range(2)}
    rebalance(model, loads, torch.zeros(()))
    torch.testing.assert_close(model.slots[0].mixer.router_bias.data, RATE * torch.tensor([1.0, 1, 1, 1, -1, -1]))


def test_without_a_rate_nothing_moves():
    loads = {"E#0": {"load": torch.arange(EXPERTS)}}
    still = plait.build({"vocab": 61} | design(rate=0.0))
    rebalance(still, loads, torch.zeros(()))
    assert not still.slots[0].mixer.router_bias.any()
    without = plait.build({"vocab": 61} | design(rate=None))
    rebalance(without, loads, torch.zeros(()))
    assert without.slots[0].mixer.router_bias is None


def test_biases_even_the_loads_out(make_run, quiet):
    """Of experts that would be loaded as their router was drawn, with nothing else to hold them."""
    spread = {}
    for rate in (0.0, 0.02):
        layers = design(rate=rate, balance_loss=0.0, z_loss=0.0, router="sigmoid")
        result = train(make_run(design=layers, folder=f"at-{rate}", steps=40, eval_every=0, lr=1e-5), console=quiet)
        loads = torch.tensor([record["stats"]["E#0"]["load"] for record in result.history[-12:] if "stats" in record])
        spread[rate] = float(loads.std(-1).mean())
    assert spread[0.02] < spread[0.0] / 2, spread


def test_muon_takes_every_expert_s_gate_and_up_apart(monkeypatch):
    model = plait.build({"vocab": 61} | design())
    named = dict(split_parameters(model, muon=True)["muon"])
    up = named["slots.0.mixer.experts_up"]
    assert "slots.0.mixer.experts_down" in named
    assert not any(name.endswith(("router", "router_bias")) for name in named)
    blocks = dict(zip(named, row_blocks(model, list(named.items())), strict=True))
    assert blocks["slots.0.mixer.experts_up"] == (16,) * 2 * EXPERTS
    assert blocks["slots.0.mixer.experts_down"] == (64,) * EXPERTS
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    before, lr = up.detach().clone(), 0.1
    run = RunConfig(design=design(), optimizer="muon", lr=lr, weight_decay=0.0, warmup=0, schedule="wsd", decay=0)
    direction = up.grad * (1 - 0.95**2)  # a first step's, looked ahead
    Optimizers(model, run).step(1)
    for expert in range(EXPERTS):
        for part in (slice(0, 16), slice(16, 32)):
            moved = (before - up)[expert, part]
            want = lr * 0.2 * 8 * orthogonal(direction[expert, part][None])[0]
            assert (moved - want).abs().max() <= 0.02 * want.abs().max()  # bfloat16 where the processor has it


def test_checkpoints_hold_the_biases_with_the_model(make_run, quiet):
    result = train(make_run(design=design(), steps=2, eval_every=0, save_every=2), console=quiet)
    assert len(checkpoints(result.folder)) == 1
    assert torch.equal(plait.load(result.folder).slots[0].mixer.router_bias, result.model.slots[0].mixer.router_bias)
