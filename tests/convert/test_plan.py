"""Plans: what they say, and what they refuse."""

import pytest
import torch
from msgspec.structs import asdict

import plait
from plait.convert import Cost, Plan, student_of
from plait.convert.plan import teacher_hash
from plait.convert.report import plan_words

KINDS = ["latent_attention", "mamba2", "gated_deltanet", "mlstm", "gru", {"window": 8, "qk_norm": False}]


def teacher_of(pattern="(AF)3", seed=0):
    layer = {"kind": "attention", "heads": 4, "kv_heads": 2, "qk_norm": True}
    return plait.build({"vocab": 61, "dim": 64, "pattern": pattern, "layers": {"A": layer}}, seed=seed)


@pytest.mark.parametrize("mixer", KINDS, ids=str)
def test_a_plan_is_its_file(tmp_path, mixer):
    teacher = teacher_of()
    scores, cost = {"A#0": 0.25, "A#1": 1e-5, "A#2": 3.0}, Cost(tokens=12, seconds=0.5)
    plan = Plan.of(teacher, "./teacher", {"A#0": mixer, "A#1": mixer}, rule="kl", scores=scores, cost=cost, seed=4)
    plan.write(tmp_path / "plan.yaml")
    read = Plan.read(tmp_path / "plan.yaml")
    assert read == plan and read.keep == ("A#2",) and read.scores == scores
    read.check(teacher)
    ours, theirs = (student_of(teacher, p) for p in (plan, read))
    assert ours.design == theirs.design
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    if isinstance(mixer, dict):
        assert ours.place("W#0").config.qk_norm is False


@pytest.mark.parametrize(
    ("replace", "words"),
    [
        ({"A#0": "mamba2", "A#1": "gru"}, "attention stays at A#2, is replaced in 2 of 3 layers"),
        (
            {"A#1": {"branches": ["mamba2", "attention"]}, "A#2": "gru"},
            "attention stays at A#0, is replaced in 1 of 3 layers, gets a branch beside it in 1 of 3 layers",
        ),
    ],
)
def test_a_plan_in_words(replace, words):
    assert Plan.of(teacher_of(), "x", replace).words == words


def test_a_person_may_leave_sizes_out(tmp_path):
    teacher = teacher_of()
    text = f"teacher: x\nteacher_hash: {teacher_hash(teacher)}\nreplace:\n  A#1: {{kind: gated_deltanet}}\nkeep: [A#0, A#2]\n"
    (tmp_path / "plan.yaml").write_text(text)
    plan = Plan.read(tmp_path / "plan.yaml")
    plan.check(teacher)
    layer = student_of(teacher, plan).design.place("D#0").layer
    assert (layer.heads, layer.head_dim, layer.value_heads) == (4, 16, 4)


@pytest.mark.parametrize(
    ("replace", "keep", "message"),
    [
        ("{}", "[A#0, A#1, A#2]", "it replaces no layer"),
        ("{A#1: {kind: gru}}", "[A#0, A#2, A#2]", "A#2 is kept twice"),
        ("{A#1: null}", "[A#0, A#2]", "plan: A#1: expected a layer, such as .* got None"),
        ("{A#1: {branches: [gru, attention], gate: 1}}", "[A#0, A#2]", "A#1: unknown key 'gate' beside branches"),
        ("{A#1: {branches: 2}}", "[A#0, A#2]", "A#1: expected a list of branches, got 2"),
        ("{A#1: {branches: [2, attention]}}", "[A#0, A#2]", "A#1: expected a layer, such as .* got 2"),
    ],
)
def test_what_no_plan_can_say(tmp_path, replace, keep, message):
    teacher = teacher_of()
    text = f"teacher: x\nteacher_hash: {teacher_hash(teacher)}\nreplace: {replace}\nkeep: {keep}\n"
    (tmp_path / "plan.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Plan.read(tmp_path / "plan.yaml").check(teacher)


def test_a_kind_alone_and_changes_of_attention_are_layers_of_a_plan(tmp_path):
    teacher = teacher_of()
    text = (
        f"teacher: x\nteacher_hash: {teacher_hash(teacher)}\nreplace: {{A#0: gru, A#1: {{window: 8}}}}\nkeep: [A#2]\n"
    )
    (tmp_path / "plan.yaml").write_text(text, encoding="utf-8")
    plan = Plan.read(tmp_path / "plan.yaml")
    assert plan.replace == {"A#0": {"kind": "gru"}, "A#1": {"kind": "attention", "window": 8}}
    words = plan_words(plan.to_dict() | {"places": ["A#0", "A#1", "A#2"]})
    assert words.endswith("the others became attention with a window of 8, gru.")


def test_a_plan_for_another_teacher_is_refused():
    plan = Plan.of(teacher_of(), "teacher", {"A#1": "mamba2"})
    for other in (teacher_of(seed=1), teacher_of("(AF)4")):
        with pytest.raises(ValueError, match="made for other weights"):
            plan.check(other)


def test_a_hash_does_not_ask_in_which_dtype_weights_were_loaded():
    teacher = teacher_of().bfloat16()
    narrow = teacher_hash(teacher)
    assert narrow == teacher_hash(teacher.float()) and narrow != teacher_hash(teacher_of())


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"A#7": "mamba2"}, r"no place 'A#7'.*A#0 to A#2"),
        ({"F#0": "mamba2"}, "F#0 is swiglu already, not attention"),
        ({"D#0": "mamba2"}, "D#0 is gated_deltanet already, not attention"),
        ({"A#0": "swiglu"}, "swiglu takes no weights of attention"),
        ({"A#0": "mambo"}, "unknown kind 'mambo'; did you mean 'mamba'"),
        ({"A#0": {"kind": {"kind": "mamba2"}}}, "A#0: unknown kind {'kind': 'mamba2'}; did you mean 'mamba2'"),
        ({"A#0": {"kind": ["mamba2", "gru"]}}, r"A#0: unknown kind \['mamba2', 'gru'\]"),
        ({"A#0": {"kind": "mamba2", "heads": 8}}, "mamba2 with heads 8 cannot .* head_dim 16, state_dim 16, groups 4"),
        ({"A#0": {"kind": "gru", "head_dim": 32}}, "gru with head_dim 32 .* heads 4, head_dim 16"),
        ({"A#0": {"windw": 8}}, "unknown key 'windw'; did you mean 'window'"),
        ({"A#0": {"kv_heads": 4}}, "kv_heads 4 cannot take these weights"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(replace, message):
    with pytest.raises(ValueError, match=message):
        Plan.of(teacher_of("AFAF DF AF"), "teacher", replace)


def test_every_attention_layer_is_kept_or_replaced():
    teacher = teacher_of()
    plan = Plan.of(teacher, "teacher", {"A#1": "mamba2"})
    with pytest.raises(ValueError, match="A#2 is neither kept nor replaced"):
        Plan(**{**asdict(plan), "keep": ("A#0",)}).check(teacher)
    with pytest.raises(ValueError, match="A#1 is kept and replaced"):
        Plan(**{**asdict(plan), "keep": ("A#0", "A#1", "A#2")}).check(teacher)
