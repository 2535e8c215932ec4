"""Parameter groups, schedules, and the optimizers' state as plain tensors."""

import pytest
import torch
from torch import nn

from plait.model import build
from plait.train import RunConfig
from plait.train.optim import Optimizers, scale, split_parameters

DESIGN = {
    "vocab": 257,
    "dim": 64,
    "pattern": "[M|D]:projection [M|A]:merge_attention F A",
    "layers": {"A": {"kind": "attention", "bias": True, "qk_norm": True}},
    "tie_embeddings": False,
}


@pytest.mark.parametrize("muon", [False, True])
def test_groups_are_disjoint_and_complete(muon):
    model = build(DESIGN)
    groups = split_parameters(model, muon)
    found = [name for group in groups.values() for name, _ in group]
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())
    assert bool(groups["muon"]) is muon


def test_weight_decay_spares_norms_biases_decays_and_convolutions():
    model = build(DESIGN)
    groups = split_parameters(model, muon=False)
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, _ in groups["decay"]} == matrices | {"embed.weight"}
    spared = {name.rpartition(".")[2] for name, _ in groups["plain"]}
    assert spared == {"weight", "bias", "A_log", "dt_bias", "D", "query"}


def test_muon_has_the_matrices_inside_the_slots_and_nothing_else():
    model = build(DESIGN)
    inside = {f"slots.{n}.weight" for n, m in model.slots.named_modules() if isinstance(m, nn.Linear)}
    assert {name for name, _ in split_parameters(model, muon=True)["muon"]} == inside
    assert "lm_head.weight" in {name for name, _ in split_parameters(model, muon=True)["decay"]}


def test_weight_decay_acts_on_its_group_alone():
    model = build(DESIGN)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    Optimizers(model, RunConfig(design=DESIGN, lr=0.1, weight_decay=0.5, warmup=0)).step(1)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, _ in split_parameters(model, muon=False)["decay"]}


def run(**changes) -> RunConfig:
    return RunConfig(design="AF", steps=100, lr_end=0.1, **changes)


@pytest.mark.parametrize("warmup", [10, 0.1])
def test_cosine(warmup):
    scales = [scale(step, run(warmup=warmup)) for step in range(1, 101)]
    assert scales[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert scales[9] == max(scales) == 1
    assert scales[54] == pytest.approx(0.55)  # half way down
    assert scales[99] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(scales[9:], scales[10:], strict=False))


def test_wsd():
    scales = [scale(step, run(schedule="wsd", warmup=10, decay=0.2)) for step in range(1, 101)]
    assert set(scales[9:80]) == {1.0}
    assert scales[80:] == pytest.approx([1 - 0.9 * step / 20 for step in range(1, 21)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_have_a_schedule(schedule, steps):
    short = RunConfig(design="AF", steps=steps, schedule=schedule)
    assert all(0 < scale(step, short) <= 1 for step in range(1, steps + 1))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_goes_through_plain_tensors(name):
    config = RunConfig(design=DESIGN, optimizer=name)

    def steps(model, optimizers, numbers):
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizers.step(number)

    model, again = build(DESIGN), build(DESIGN)
    optimizers = Optimizers(model, config)
    steps(model, optimizers, [1, 2])
    again.load_state_dict(model.state_dict())
    restored = Optimizers(again, config)
    restored.load_tensors({key: value.clone() for key, value in optimizers.tensors().items()})
    steps(model, optimizers, [3])
    steps(again, restored, [3])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="'slots.9.x'"):
        restored.load_tensors({**optimizers.tensors(), "slots.9.x.exp_avg": torch.zeros(1)})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rates_multiply_what_each_part_moves_by(optimizer):
    """The last key that fits counts: a tenth for all, the whole for A#1, nothing for norms and the first M."""
    given = {"*": 0.1, "A": 1, "M#0": 0, "*norm.weight": 0}
    own = {"design": DESIGN, "lr": 0.01, "weight_decay": 0.5, "warmup": 0, "optimizer": optimizer}
    plain, rated = build(DESIGN), build(DESIGN)
    before = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    for model, rates in ((plain, {}), (rated, given)):
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        Optimizers(model, RunConfig(**own, rates=rates)).step(1)
    after = dict(rated.named_parameters())
    for name, parameter in plain.named_parameters():
        attention = name.startswith(("slots.1.mixer.branches.1.layers.0.", "slots.3.mixer."))
        still = name.endswith("norm.weight") or name.startswith("slots.0.mixer.branches.0.layers.0.")
        share = 0 if still else 1 if attention else 0.1
        moved, usual = after[name] - before[name], parameter - before[name]
        torch.testing.assert_close(moved, share * usual, rtol=1e-3, atol=1e-7)  # float32 of weights of size 1


def test_a_rate_for_nothing_is_refused():
    with pytest.raises(ValueError, match="rates: no layer or weight is 'B#0'"):
        Optimizers(build(DESIGN), RunConfig(design=DESIGN, rates={"B#0": 1}))
    with pytest.raises(ValueError, match="nothing is trained"):
        Optimizers(build(DESIGN), RunConfig(design=DESIGN, rates={"*": 0}))
