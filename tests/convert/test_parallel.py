"""Attention beside a new branch: the teacher before training, one branch after pruning, and what a gate does between."""

import copy

import pytest
import torch

import plait
from plait.convert import Alignment, Plan, Stages, student_of
from plait.convert.align import powers, slots_of
from plait.convert.gates import LEFT, Priced, gates, pruned, to_prune, weights_of
from plait.convert.planning import laid_out, mixer_of
from plait.convert.report import plan_words
from plait.convert.results import results
from plait.convert.stages import kept_attention
from plait.data import Batch
from plait.model import Distillation
from plait.model.files import stored
from plait.train import load_run

EQUAL = 1e-9  # float64: sums of some thousand numbers of size 1
ROUNDING = 1e-6  # float32, of logits of size 1
TEACHERS = {
    "plain": {},
    "qk_norm, output gate, biases": {"layers": {"qk_norm": True, "output_gate": True, "bias": True}},
    "norms on both sides": {"wrap": {"norms": "both", "factor": 0.5}},
    "a letter's own wrap": {"layers": {"wrap": {"norms": "after", "keep": 0.9, "factor": 0.7}}},
    "a window, by an address": {"at": {"A#1": {"window": 5, "kv_heads": 1}}},
    "inside a branch": {"pattern": "(AF)2 [M|A]F A"},
}


def teacher_of(dtype=torch.float64, layers=None, **design):
    layer = {"kind": "attention", "heads": 4, "kv_heads": 2, **(layers or {})}
    full = {"vocab": 61, "dim": 64, "pattern": "(AF)3", "layers": {"A": layer}, **design}
    teacher = plait.build(full, seed=1, dtype=dtype)
    for name, parameter in teacher.named_parameters():
        if name.endswith(("norm.weight", "after.weight", "bias")):
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    return teacher


def beside(*kinds, at=("A#0", "A#2")):
    return {address: {"branches": list(kinds)} for address in at}


def student(teacher, *kinds, **how):
    return student_of(teacher, Plan.of(teacher, "", beside(*(kinds or ("gated_deltanet", "attention")))), **how)


def serial_student(teacher, text):
    """Calibrated, so that nothing of it is as it was drawn."""
    return student_of(teacher, Plan.of(teacher, "", dict.fromkeys(("A#0", "A#2"), "gated_deltanet")), text=text)


def some_batch(length=48):
    ids = torch.randint(61, (1, length + 1), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1], ids[:, 1:], torch.tensor([0, length], dtype=torch.int32), 0)


def turn(model, share):
    """Weights of attention, by gate."""
    for gate, value in zip(gates(model.design), share, strict=True):
        shift = model.place(gate.address).merge.shift
        with torch.no_grad():
            shift.fill_(1 - value)
            shift[gate.attention] = value - 1
    return model


@pytest.mark.parametrize("teacher", TEACHERS)
@torch.no_grad()
def test_nothing_is_lost_before_training(teacher):
    teacher, x = teacher_of(torch.float32, **TEACHERS[teacher]), some_batch().inputs
    theirs = teacher(x)[0]
    for kinds in (("gated_deltanet", "attention"), ("attention", "mamba2"), ("kimi_delta_attention", "attention")):
        model = student(teacher, *kinds, text=x)
        assert (model(x)[0] - theirs).abs().max() <= ROUNDING * theirs.abs().max()
        assert len(gates(model.design)) == 2
        assert (turn(copy.deepcopy(model), (0.5, 0.5))(x)[0] - theirs).abs().max() > 1e-3


def test_attention_is_the_teacher_s_and_the_new_branch_that_of_a_serial_student():
    teacher, x = teacher_of(), some_batch().inputs
    both = student(teacher, text=x)
    serial = serial_student(teacher, x)
    assert both.design.pattern == "[D|A]:sum_a FAF[D|A]:sum_a F"
    for i in range(2):
        ours, theirs = both.place(f"D#{i}").state_dict(), serial.place(f"D#{i}").state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [both.place(f"A#{i}") is teacher.place(f"A#{i}") for i in range(3)] == [True] * 3


def test_alignment_is_that_of_the_serial_student():
    """Losses and gradients of the new branches, and none of the gates."""
    teacher, batch = teacher_of(), some_batch()
    serial, both = serial_student(teacher, batch.inputs), student(teacher, text=batch.inputs)
    scale = powers(teacher, slots_of(teacher.design, ["A#0", "A#2"]), [batch], "float32")
    losses = [Alignment(model.requires_grad_(True), teacher, scale)(batch) for model in (serial, both)]
    for loss in losses:
        loss.total.backward()
    assert losses[1].total.item() == pytest.approx(losses[0].total.item(), rel=EQUAL)
    assert losses[1].parts.keys() == {"D#0", "D#1"}
    for i in range(2):
        pairs = zip(serial.place(f"D#{i}").parameters(), both.place(f"D#{i}").parameters(), strict=True)
        for theirs, ours in pairs:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=EQUAL, atol=EQUAL)
    assert both.place("par#0").merge.shift.grad is None


@pytest.mark.parametrize("kind", ["gated_deltanet", "mamba2", "gru", "latent_attention"])
@torch.no_grad()
def test_pruning_loses_what_attention_still_gave(kind):
    teacher, x = teacher_of(), some_batch().inputs
    model = student(teacher, kind, "attention")
    turn(model, (0.0, 0.6))
    shift = model.place("par#0").merge.shift
    shift.add_(0.3)  # what all have in common changes nothing
    before = {name: weight.clone() for name, weight in stored(model).items()}
    less = pruned(model, ["par#0"])
    assert "[" not in less.design.pattern[:2] and less.design.pattern.count("[") == 1
    assert (less(x)[0] - model(x)[0]).abs().max() <= EQUAL
    less = pruned(turn(model, (0.25, 0.6)), ["par#0"])
    by_hand = copy.deepcopy(model)
    by_hand.place("A#0").o_proj.weight.zero_()
    assert (less(x)[0] - by_hand(x)[0]).abs().max() <= EQUAL
    turn(model, (0.0, 0.6)).place("par#0").merge.shift.add_(0.3)
    assert all(torch.equal(before[name], weight) for name, weight in stored(model).items())


def test_which_slots_are_pruned():
    teacher = teacher_of(pattern="(AF)5")
    plan = Plan.of(teacher, "", beside("mamba2", "attention", at=[f"A#{i}" for i in range(4)]))
    model = student_of(teacher, plan)
    turn(model, (0.4, -0.02, 0.9, LEFT / 2))
    assert to_prune(model, None) == ["par#1", "par#3"]
    assert to_prune(model, 5) == [] and to_prune(model, 4) == ["par#1"]
    assert to_prune(model, 2) == ["par#0", "par#1", "par#3"]
    with pytest.raises(ValueError, match="A#0 has no gate between attention and one new mixer"):
        pruned(model, ["A#0"])
    with pytest.raises(ValueError, match="no place 'par#4'"):
        pruned(model, ["par#4"])


def test_a_price_is_what_attention_weighs():
    teacher, batch = teacher_of(), some_batch()
    model = turn(student(teacher), (0.5, -0.25))
    plain = Distillation(model.requires_grad_(True), teacher)
    priced = Priced(plain, 0.2)
    with torch.no_grad():
        assert priced(batch).total.item() == plain(batch).total.item()  # what is held out is not priced
    assert (priced(batch).mean - plain(batch).mean).item() == pytest.approx(0.2 * 0.75, rel=EQUAL)
    priced(batch).mean.backward()
    with_price = [model.place(f"par#{i}").merge.shift.grad.clone() for i in range(2)]
    model.zero_grad()
    plain(batch).mean.backward()
    for i, sign in enumerate((1, -1)):
        moved = with_price[i] - model.place(f"par#{i}").merge.shift.grad
        expected = torch.tensor([-0.1, 0.1], dtype=torch.float64) * sign  # of w = 1/2 +- (s_A - s_D) / 2
        torch.testing.assert_close(moved, expected, rtol=EQUAL, atol=EQUAL)


def test_a_plan_says_its_branches(tmp_path):
    teacher = teacher_of()
    plan = Plan.of(teacher, "x", beside("attention", {"kind": "mamba2"}))
    plan.write(tmp_path / "plan.yaml")
    read = Plan.read(tmp_path / "plan.yaml")
    assert read == plan and [branch["kind"] for branch in read.replace["A#0"]["branches"]] == ["attention", "mamba2"]
    read.check(teacher)
    assert student_of(teacher, read).design == student_of(teacher, plan).design


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (
            ["gated_deltanet", "mamba2"],
            "A#0: .* beside one attention, .* got gated_deltanet . mamba2; expected such as",
        ),
        (["attention", {"kind": "attention", "window": 4}], "beside one attention"),
        (["attention"], "beside one attention"),
        (["gated_deltanet", "swiglu"], "swiglu takes no weights of attention"),
        ([{"kind": "mamba2", "heads": 8}, "attention"], "mamba2 with heads 8 cannot"),
    ],
)
def test_branches_that_cannot_be(kinds, message):
    with pytest.raises(ValueError, match=message):
        Plan.of(teacher_of(), "", beside(*kinds))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": "[D|A]:gated F AF"}, "merge does not begin at attention; leave it out"),
        ({"to": "[DF|A] F AF"}, "one mixer; expected such as '.D|A.'"),
        ({"to": "[D|M]F AF"}, "beside one attention"),
        ({"to": "A[D|A] AF"}, "has par#0 where the teacher has F#0"),
        ({"to": "[D|Q]F AF"}, "no layer is bound to 'Q'"),
        ({"to": None, "mixer": ["[D|A]F"], "keep": 1}, "'.D|A.F' is 2 slots"),
        ({"prune": "25%"}, "there are none; give --to or --mixer such as"),
        (
            {"to": "[D|A]F AF", "prune": 0},
            "prune: 0 leaves no number of attention layers from 1, which stand alone, to 2",
        ),
        ({"to": "[D|A]F AF", "prune": "lft"}, "prune: 'lft' .* or 'left'"),
    ],
)
def test_what_cannot_be_leaves_nothing(make_asked, quiet, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Stages(make_asked(**changes), quiet).upto("model")
    assert not (tmp_path / "out" / "plan.yaml").exists()


def test_pruning_is_a_stage(make_asked, quiet, tmp_path, teacher_folder):
    """The gates leave attention at a high price, one slot loses it, and finishing goes on from there."""
    out, more = tmp_path / "out", {"finish_share": 1 / 3, "price": 5.0, "distil": {"lr": 0.05}}
    asked = make_asked(to="[D|A]F", prune="50%", **more)
    stages = Stages(asked, quiet)
    stages.upto("model")
    transferred, aligned, distilled, less = (
        plait.load(out / name) for name in ("transfer", "align", "distil", "prune")
    )
    x = torch.arange(40)[None]
    torch.testing.assert_close(transferred(x)[0], plait.load(teacher_folder)(x)[0], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(aligned(x)[0], transferred(x)[0], rtol=0, atol=0)  # only new branches learned
    new = "slots.0.mixer.branches.0.layers.0.in_proj.weight"
    assert not torch.equal(stored(aligned)[new], stored(transferred)[new])
    assert all(weights_of(distilled, gate)[gate.attention] < 0.5 for gate in gates(distilled.design))
    assert less.design.pattern.count("[") == 1 and plait.load(out).design == less.design
    assert load_run(out / "finish").start == str(out / "prune") and load_run(out / "align").rates.keys() == {
        "*",
        "D#0",
        "D#1",
    }
    words = plan_words(results(stages, {}, {})["plan"])
    assert words.endswith("became gated_deltanet beside attention. Pruning took attention out of 1.")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    Stages(asked, quiet).upto("model")
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_a_rule_tries_the_new_mixer_alone(make_asked, quiet, tmp_path):
    found = {}
    for mixer in ("D", "[A|D]"):
        out = tmp_path / mixer[0]
        Stages(make_asked(out=str(out), to=None, mixer=[mixer], keep=1, select="kl"), quiet).upto("plan")
        found[mixer] = Plan.read(out / "plan.yaml")
    assert found["D"].scores == found["[A|D]"].scores and found["D"].keep == found["[A|D]"].keep
    (branches,) = found["[A|D]"].replace.values()
    assert [branch["kind"] for branch in branches["branches"]] == ["attention", "gated_deltanet"]


def test_a_width_that_the_usual_sizes_do_not_fit():
    """Sizes are the attention's; the letters' own, of heads of 64, are not asked for."""
    design = teacher_of(dim=40, layers={"head_dim": 12}).design
    want = {"branches": [plait.GatedDeltaNet().to_dict(), {"kind": "attention"}]}
    assert mixer_of("[D|A]", design) == want
    assert laid_out(design, "DF [D|A]F AF") == {"A#0": plait.GatedDeltaNet().to_dict(), "A#1": want}


def test_how_much_attention_pruning_leaves():
    replace = beside("mamba2", "attention", at=["A#0", "A#3"]) | {"A#1": {"kind": "mamba2"}}
    plan = Plan.of(teacher_of(pattern="(AF)8"), "", replace)
    assert len(plan.keep) == 5
    assert kept_attention(None, plan) is None and kept_attention("left", plan) is None
    assert kept_attention("75%", plan) == kept_attention(6, plan) == kept_attention("6", plan) == 6
