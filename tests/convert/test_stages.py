"""A conversion: what each stage leaves, that it is done once and to the bit, and what is refused before anything is written."""

import json
import shutil
import signal

import pytest
import torch

import plait
from plait.convert import Alignment, Plan, Stages
from plait.convert.conversion import Conversion
from plait.convert.distil import retied, untied
from plait.convert.results import results
from plait.data import ByteTokenizer
from plait.model import Distillation
from plait.model.files import stored
from plait.run_folder import checkpoints
from plait.train import Interrupted, load_run

TOKENS = torch.arange(40)[None] % 256


def same(one, other) -> bool:
    one, other = stored(one), stored(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_stages_leave_what_they_say(make_asked, quiet, tmp_path, teacher_folder):
    asked = make_asked()
    Stages(asked, quiet).upto("model")
    out, teacher = tmp_path / "out", plait.load(teacher_folder)
    plan = Plan.read(out / "plan.yaml")
    assert plan.keep == ("A#1",) and plan.replace["A#0"]["kind"] == "gated_deltanet" and plan.rule == "pattern"
    transferred, aligned, distilled = (plait.load(out / name) for name in ("transfer", "align", "distil"))
    assert transferred.design.pattern == "DFAF"
    for name, weight in stored(transferred).items():
        new = name.startswith("slots.0.mixer.")
        assert torch.equal(weight, stored(aligned)[name]) is not new, name
        assert not torch.equal(weight, stored(distilled)[name]), name
        if not new:
            assert torch.equal(weight, stored(teacher)[name]), name
    assert same(plait.load(out), distilled)
    tokenizer = plait.load_tokenizer(out)
    assert plait.generate(plait.load(out), tokenizer, "state ", max_tokens=4) is not None
    runs = {name: load_run(out / name) for name in ("align", "distil")}
    assert (runs["align"].steps, runs["distil"].steps) == (4, 8)
    assert runs["align"].rates == {"*": 0.0, "D#0": 1.0} and runs["distil"].rates == {"*": asked.body, "D#0": 1.0}


def test_done_is_not_done_again(make_asked, quiet, tmp_path):
    Stages(make_asked(), quiet).upto("model")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    Stages(make_asked(device="auto"), quiet).upto("model")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert before == after


@pytest.mark.parametrize(("stage", "objective", "call"), [("align", Alignment, 2), ("distil", Distillation, 5)])
def test_a_stopped_stage_goes_on_to_the_bit(make_asked, quiet, tmp_path, monkeypatch, stage, objective, call):
    Stages(make_asked(out=str(tmp_path / "whole")), quiet).upto("model")
    calls, forward = [], objective.forward

    def stopping(self, *given, **more):
        calls.append(0)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *given, **more)

    monkeypatch.setattr(objective, "forward", stopping)
    with pytest.raises(Interrupted, match=f"{stage} stopped"):
        Stages(make_asked(), quiet).upto("model")
    left = checkpoints(tmp_path / "out" / stage)
    assert [path.name for path in left] == [f"step-{call:06}"]
    Stages(make_asked(), quiet).upto("model")
    assert same(plait.load(tmp_path / "whole"), plait.load(tmp_path / "out"))


def test_a_plan_may_be_edited_until_it_is_used(make_asked, quiet, tmp_path):
    out = tmp_path / "out"
    Stages(make_asked(), quiet).upto("plan")
    plan = Plan.read(out / "plan.yaml")
    assert {path.name for path in out.iterdir()} == {"convert.yaml", "plan.yaml", "lock"}
    teacher = Stages(make_asked(), quiet).teacher
    Plan.of(teacher, plan.teacher, {"A#0": "mamba2", "A#1": "gru"}).write(out / "plan.yaml")
    Stages(make_asked(), quiet).upto("transfer")
    assert plait.load(out / "transfer").design.pattern == "MFGF"
    plan.write(out / "plan.yaml")
    with pytest.raises(ValueError, match="not the plan that .*transfer was made by"):
        Stages(make_asked(), quiet).upto("align")


def test_text_is_looked_at_before_the_folder_is_taken(make_asked, quiet, tmp_path):
    """So that the same command with other text need not go elsewhere."""
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    for name, message in (("none.txt", "no such file"), ("short.txt", "nothing held out can be predicted")):
        with pytest.raises(ValueError, match=message):
            Stages(make_asked(data={"source": str(tmp_path / name), "length": 32}), quiet).upto("model")
        assert {path.name for path in (tmp_path / "out").rglob("*")} <= {"lock"}
    Stages(make_asked(), quiet).upto("transfer")


def test_a_folder_may_be_moved_while_a_stage_is_stopped(make_asked, quiet, tmp_path, monkeypatch):
    Stages(make_asked(out=str(tmp_path / "whole")), quiet).upto("model")
    calls, forward = [], Distillation.forward

    def stopping(self, *given, **more):
        calls.append(0)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *given, **more)

    monkeypatch.setattr(Distillation, "forward", stopping)
    with pytest.raises(Interrupted):
        Stages(make_asked(), quiet).upto("model")
    (tmp_path / "out").rename(tmp_path / "moved")
    Stages(make_asked(out=str(tmp_path / "moved")), quiet).upto("model")
    assert len(calls) == 8 + 2  # steps, and batches of what is held out
    assert same(plait.load(tmp_path / "whole"), plait.load(tmp_path / "moved"))


def test_a_pattern_puts_windows_in_the_place_of_attention(make_asked, quiet, tmp_path):
    """And leaves the teacher's own where its letter stands."""
    Stages(make_asked(to="WF AF"), quiet).upto("transfer")
    student = plait.load(tmp_path / "out/transfer").design
    first, second = student.slots[::2]
    assert (first.layer.window, second.layer.window) == (512, None) and student.pattern == "WFAF"
    layer = plait.Attention(heads=4, head_dim=16, window=8)
    design = plait.ModelConfig(vocab=257, dim=64, pattern="WF AF", layers={"W": layer})
    plait.save(plait.build(design, seed=3), tmp_path / "windowed", ByteTokenizer())
    Stages(make_asked(teacher=str(tmp_path / "windowed"), out=str(tmp_path / "o2"), to="WF DF"), quiet).upto("plan")
    assert Plan.read(tmp_path / "o2/plan.yaml").keep == ("W#0",)


def test_a_letter_of_the_teachers_takes_the_sizes_of_attention(make_asked, quiet, tmp_path):
    """In the place of attention; where the letter stands in the teacher, its sizes are its own."""
    mamba = plait.Mamba2(heads=2, head_dim=32, state_dim=8, conv_width=3)
    design = plait.ModelConfig(vocab=257, dim=64, pattern="MF AF", layers={"M": mamba})
    plait.save(plait.build(design, seed=3), tmp_path / "hybrid", ByteTokenizer())
    Stages(make_asked(teacher=str(tmp_path / "hybrid"), to="MF"), quiet).upto("transfer")
    student = plait.load(tmp_path / "out/transfer").design
    first, second = (place.layer for place in student.slots[::2])
    assert (first.heads, first.head_dim, first.state_dim, first.conv_width) == (2, 32, 8, 3)
    assert (second.heads, second.head_dim, second.state_dim, second.conv_width) == (1, 64, 64, 3)


def test_a_teacher_of_few_positions_is_calibrated_within_them(make_asked, quiet, tmp_path):
    """A text is longer than these; rows are not."""
    front, layers = plait.Tokens(positions=40), {"A": plait.Attention(rope=None)}
    design = plait.ModelConfig(vocab=257, dim=64, pattern="(AF)2", front=front, layers=layers)
    plait.save(plait.build(design, seed=3), tmp_path / "few", ByteTokenizer())
    how = {"teacher": str(tmp_path / "few"), "to": None, "mixer": ["D"], "keep": 1, "select": "kl"}
    Stages(make_asked(**how), quiet).upto("model")
    assert plait.load(tmp_path / "out").max_positions == 40
    for key, changes in {
        "distil.length": {"distil": {"length": 41}},
        "training.length": {"training": {"length": 99}},
    }.items():
        with pytest.raises(ValueError, match=f"positions end at 40; give {key}=40"):
            Stages(make_asked(**how | {"out": str(tmp_path / "long")} | changes), quiet).upto("model")
        assert not (tmp_path / "long").exists()


def test_a_plan_for_another_teacher_is_refused(make_asked, quiet, tmp_path, teacher_folder):
    Stages(make_asked(), quiet).upto("plan")
    other = plait.build(plait.load(teacher_folder).design, seed=4)
    plait.save(other, tmp_path / "other", ByteTokenizer())
    with pytest.raises(ValueError, match="made for other weights"):
        Stages(make_asked(teacher=str(tmp_path / "other")), quiet).upto("transfer")
    assert not (tmp_path / "out" / "transfer").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": "FD FA"}, "has F#0 where the teacher has A#0"),
        ({"to": "AF AF"}, "replaces nothing"),
        ({"to": "DF DF DF"}, "has 6 slots, the teacher 4"),
        ({"to": "D:"}, "pattern"),
        ({"to": None}, "say what takes attention's place"),
        ({"mixer": ["D"]}, "not both"),
        ({"to": None, "mixer": ["Dd"]}, "no letter or kind 'Dd'"),
        ({"to": None, "mixer": ["W"], "keep": "A#7"}, "'A' goes from A#0 to A#1"),
        ({"to": None, "mixer": ["D"], "keep": "100%"}, "2 of 2 attention layers"),
        ({"to": None, "mixer": ["D"], "select": "best"}, "no rule 'best'"),
        ({"to": None, "mixer": ["D"], "keep": -1}, "--keep -1: -1 of 2 attention layers"),
        ({"to": None, "mixer": ["D"], "keep": "A#0,A#1"}, "2 of 2 attention layers"),
        ({"to": None, "mixer": ["D"], "keep": "F#0"}, "--keep: F#0 is not attention; expected some of A#0, A#1"),
        ({"to": None, "mixer": ["D"], "keep": "A#0", "select": "kl"}, "addresses such as .* for the rule list alone"),
        ({"to": None, "mixer": ["D"], "keep": 1, "select": "list"}, "addresses such as .* for the rule list alone"),
        ({"to": None, "mixer": ["[W|A]"], "select": "kl"}, "got attention . attention; expected such as"),
        ({"to": None, "mixer": ["[D|A|M]"], "keep": 0, "prune": 1}, "prune: A#0 has no gate between attention and one"),
        ({"to": None, "mixer": ["C"]}, "gated_conv takes no weights of attention; what does: .*kimi_delta_attention"),
    ],
)
def test_what_cannot_be_leaves_nothing(make_asked, quiet, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Stages(make_asked(**changes), quiet).upto("model")
    assert not (tmp_path / "out" / "plan.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 100}, "less than one step of 128 .4 sequences of 32.; give at least 384"),
        ({"align_share": 0.8, "finish_share": 0.3}, "more than the budget"),
        ({"data": {"tokenizer": {"bpe": 300}}}, "the teacher's tokenizer"),
        ({"distil": {"steps": 4}}, "what the conversion sets itself"),
        ({"distil": {"lerning_rate": 4}}, "unknown key"),
        ({"head": "untied"}, "'untied' does not exist"),
        ({"align": {"seed": 4}}, "align.seed is what the conversion sets itself"),
        ({"training": {"device": "cpu"}}, "training.device is what the conversion sets itself"),
        ({"finish": {"length": 64}}, "finish has no share of the budget, so its keys change nothing"),
        ({"align_share": 1.0, "prune": "left"}, "gates move away from attention while distilling, which has no share"),
        ({"align_share": 1.0, "head": "retied"}, "'retied' is learned while distilling, which has no share"),
    ],
)
def test_numbers_that_cannot_be(make_asked, changes, message):
    with pytest.raises(ValueError, match=message):
        make_asked(**changes)


def test_a_recurrent_layer_is_not_replaced_again(make_asked, quiet, tmp_path):
    """A hybrid may be a teacher, for the attention that it has."""
    Stages(make_asked(), quiet).upto("model")
    hybrid = {"teacher": str(tmp_path / "out"), "out": str(tmp_path / "again")}
    with pytest.raises(ValueError, match="has M#0 where the teacher has D#0"):
        Stages(make_asked(**hybrid, to="MF AF"), quiet).upto("plan")
    Stages(make_asked(**hybrid, to="DF MF"), quiet).upto("model")
    assert plait.load(tmp_path / "again").design.pattern == "DFMF"
    third = {"teacher": str(tmp_path / "again"), "out": str(tmp_path / "third")}
    with pytest.raises(ValueError, match="has no attention to replace"):
        Stages(make_asked(**third, to="MF MF"), quiet).upto("plan")


def test_a_folder_holds_one_conversion(make_asked, quiet, tmp_path, teacher_folder):
    Stages(make_asked(), quiet).upto("plan")
    with pytest.raises(ValueError, match="holds a conversion with body 0.3, not 0.5"):
        Stages(make_asked(body=0.5), quiet).upto("plan")
    shutil.copytree(teacher_folder, tmp_path / "model")
    with pytest.raises(ValueError, match="holds a model or a run"):
        Stages(make_asked(out=str(tmp_path / "model")), quiet).upto("plan")


@pytest.mark.parametrize("bias", [False, True])
def test_an_untied_head_begins_as_the_tied_one(bias):
    head = {"kind": "logits", "bias": bias, "scale": 0.5}
    model = plait.build(plait.ModelConfig(vocab=257, dim=64, pattern="AF", head=head), seed=2)
    if bias:
        torch.nn.init.normal_(model.lm_head_bias)
    own = untied(model)
    assert not own.design.tied and "lm_head.weight" in stored(own)
    torch.testing.assert_close(
        own(TOKENS)[0], model(TOKENS)[0], rtol=0, atol=1e-6
    )  # one product, the bias added in another place
    assert same(retied(own), model)


@pytest.mark.parametrize(("head", "tied"), [("own", False), ("retied", True)])
def test_heads_while_distilling(make_asked, quiet, tmp_path, head, tied):
    stages = Stages(make_asked(head=head, finish_share=1 / 3, finish={"length": 64}), quiet)
    stages.upto("model")
    assert ("finish" in results(stages, {}, {})["after"]) is tied  # what was measured before its head was dropped
    distilled, model = plait.load(tmp_path / "out/finish"), plait.load(tmp_path / "out")
    assert not distilled.design.tied and model.design.tied is tied
    assert load_run(tmp_path / "out/finish").data.length == 64
    assert torch.equal(model.embed.weight, distilled.embed.weight)


def test_without_alignment_the_student_begins_as_it_was_transferred(make_asked, quiet, tmp_path):
    Stages(make_asked(align_share=0), quiet).upto("model")
    assert not (tmp_path / "out/align").exists()
    assert load_run(tmp_path / "out/distil").start == str(tmp_path / "out/transfer")


def test_rules_choose_and_say_what_it_cost(make_asked, quiet, tmp_path):
    Stages(make_asked(to=None, mixer=["M"], keep="50%", select="window"), quiet).upto("plan")
    plan = Plan.read(tmp_path / "out/plan.yaml")
    assert len(plan.keep) == 1 and plan.scores.keys() == {"A#0", "A#1"} and plan.cost.tokens > 0


def test_results_are_measured_once(make_asked, quiet, tmp_path):
    stages, asked_for = Stages(make_asked(), quiet), []
    stages.upto("model")

    def measure(model, tokenizer):
        asked_for.append(model.design.pattern)
        return {"letters": 1.0, "state bytes": {256: 10, 1024: 20}}

    data = results(stages, {"letters": measure}, {"machine": "here"})
    assert data == results(Stages(make_asked(), quiet), {"letters": measure}, {})
    assert asked_for == [stages.teacher.design.pattern, "DFAF"]
    assert json.loads((tmp_path / "out/report.json").read_text()) == data
    assert data["after"].keys() == {"transfer", "align"} and data["stages"]["align"]["tokens"] == 4 * 128
    assert data["stages"]["align"]["layers"]["D#0"] == pytest.approx(data["stages"]["align"]["losses"][-1][1], rel=1e-5)
    assert data["teacher"]["measured"]["state bytes"] == {"256": 10, "1024": 20}


def test_another_measure_is_taken_beside_those_that_were(make_asked, quiet, tmp_path):
    Stages(make_asked(), quiet).upto("model")
    taken = []

    def measure_of(name):
        def measure(model, tokenizer):
            taken.append(name)
            return {name: float(len(taken))}

        return {name: measure}

    stages = Stages(make_asked(), quiet)
    first = results(stages, measure_of("one"), {"command": "first"})
    both = results(stages, measure_of("one") | measure_of("two"), {"command": "second"})
    assert taken == ["one", "one", "two", "two"] and both["command"] == "second"
    assert both["student"]["measured"] == first["student"]["measured"] | {"two": 4.0}
    assert both == json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))


def test_steps_follow_the_budget():
    """About two thousand in a stage, and never fewer than four sequences in one."""
    big = Conversion(teacher="t", out="o", budget=150_000_000, data={"length": 2048}).runs(("D#0",))
    assert {name: (run.batch, run.data.length, run.steps) for name, run in big.items()} == {
        "align": (29, 512, 2_020),
        "distil": (29, 2048, 2_020),
    }
    small = Conversion(teacher="t", out="o", budget=400_000, data={"length": 128}).runs()
    assert {name: (run.batch, run.steps) for name, run in small.items()} == {"align": (4, 156), "distil": (4, 625)}


def test_a_model_of_transformers_keeps_its_chat(make_asked, quiet, tmp_path):
    """Grouped keys, a tokenizer and a chat template that are not ours; a vocabulary padded beyond the tokenizer's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.engine.conftest import CHATML, letters

    inner = letters()
    inner.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, num_hidden_layers=3, bos_token_id=None, eos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    inner.save(str(tmp_path / "llama" / "tokenizer.json"))
    (tmp_path / "llama" / "chat_template.jinja").write_text(CHATML)
    Stages(make_asked(teacher=str(tmp_path / "llama"), to="DF MF AF"), quiet).upto("model")
    model, tokenizer = plait.load(tmp_path / "out"), plait.load_tokenizer(tmp_path / "out")
    assert model.design.pattern == "DFMFAF" and model.design.vocab == 64
    assert tokenizer.chat_template.text == CHATML
    assert isinstance(plait.generate(model, tokenizer, "hello", chat=True, max_tokens=3), str)
