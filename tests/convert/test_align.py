"""Alignment beside what it is said to be: each new layer's error on the teacher's own stream, and nothing else."""

import pytest
import torch

import plait
from plait.convert import Alignment, Plan, student_of
from plait.convert.align import powers, slots_of
from plait.data import Batch
from plait.layers import context_for
from plait.layers.channels import Channels
from plait.train.heldout import mean_loss

DESIGN = plait.ModelConfig(vocab=61, dim=64, pattern="(AF)2 [A|M]F A")
EQUAL = 1e-9  # float64: sums of some thousand numbers of size 1


@pytest.fixture
def teacher():
    return plait.build(DESIGN, seed=1, dtype=torch.float64)


@pytest.fixture
def student(teacher):
    plan = Plan.of(teacher, "", {"A#0": "gated_deltanet", "A#2": "mamba2", "A#3": "gru"})
    return student_of(teacher, plan)


SLOTS = [0, 4, 6]


@pytest.fixture
def batch():
    ids = torch.randint(61, (1, 49), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1], ids[:, 1:], torch.tensor([0, 20, 48], dtype=torch.int32), 0)


@torch.no_grad()
def errors(teacher, student, batch):
    """By slot, sums over positions of the mean square of the difference and of what the teacher adds, document by document."""
    found = {slot: torch.zeros(2, dtype=torch.float64) for slot in SLOTS}
    for ids in batch.inputs.split([20, 28], 1):
        x = teacher.embed(ids)
        for i in range(len(teacher.slots)):
            theirs, _ = teacher.run(x, context_for(x), slots=[i])
            if i in SLOTS:
                ours, _ = student.run(x, context_for(x), slots=[i])
                for k, difference in enumerate((ours - theirs, theirs - x)):
                    found[i][k] += difference.square().mean(-1).sum()
            x = theirs
    return found


def test_the_slots_are_those_that_changed(teacher):
    assert slots_of(teacher.design, ["A#0", "A#2", "A#3"]) == SLOTS


def test_loss_is_each_layers_error_on_the_teachers_stream(teacher, student, batch):
    expected = errors(teacher, student, batch)
    scale = powers(teacher, SLOTS, [batch], "float32")
    assert scale == pytest.approx({slot: float(e[1]) / 48 for slot, e in expected.items()}, rel=EQUAL)
    objective = Alignment(student, teacher, scale)
    loss = objective(batch)
    own = [float(e[0]) / scale[slot] / 3 for slot, e in expected.items()]
    assert [float(part) for part in loss.parts.values()] == pytest.approx(own, rel=EQUAL)
    assert list(loss.parts) == [student.design.slots[slot].address for slot in SLOTS]
    assert loss.total.item() == pytest.approx(sum(own), rel=EQUAL)
    assert int(loss.count) == int(objective.count(batch)) == 48


def test_gradients_stay_in_their_layer(teacher, student, batch):
    scale = powers(teacher, SLOTS, [batch], "float32")
    student.requires_grad_(True)
    Alignment(student, teacher, scale)(batch).total.backward()
    together = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    for slot in SLOTS:
        student.zero_grad(set_to_none=True)
        Alignment(student, teacher, {slot: 3 * scale[slot]})(batch).total.backward()
        alone = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        assert alone and all(name.startswith(f"slots.{slot}.") for name in alone)
        for name, grad in alone.items():
            torch.testing.assert_close(grad, together.pop(name), rtol=EQUAL, atol=EQUAL)
    assert not together


def test_what_equals_the_teacher_has_no_error(teacher, batch):
    """A window that is longer than the text sees all of it."""
    same = student_of(teacher, Plan.of(teacher, "", {"A#1": {"kind": "attention", "window": 64}}))
    heldout = mean_loss(Alignment(same, teacher, powers(teacher, [2], [batch], "float32")), [batch])
    assert heldout.loss < EQUAL and heldout.tokens == 48


def test_layers_say_how_they_were_solved(teacher, student, batch):
    sent = Channels()
    Alignment(student, teacher, dict.fromkeys(SLOTS, 1.0))(batch, channels=sent)
    assert list(sent.stats) == ["G#0"]
