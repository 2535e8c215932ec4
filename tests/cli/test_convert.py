"""`plait convert` as a user types it."""

import pytest

import plait as library
from plait.data import ByteTokenizer

FOUR = ("align.batch=2", "distil.batch=2", "training.eval_tokens=64")


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "transformer"
    design = library.ModelConfig(vocab=257, dim=64, pattern="(AF)2")
    library.save(library.build(design), folder, ByteTokenizer())
    (folder.parent / "text.txt").write_text("def one():\n    return 1\n\n" * 200)
    return folder


@pytest.fixture
def words(transformer, tmp_path):
    data = ("--data", str(transformer.parent / "text.txt"), "data.length=32", f"data.cache={tmp_path}/cache")
    return [str(transformer), *FOUR, *data, "--device", "cpu", "--out", str(tmp_path / "out")]


def test_a_transformer_becomes_a_hybrid(plait, words, tmp_path):
    ran = plait("convert", *words, "--to", "DF AF", "--budget", "640", "--json")
    assert ran.code == 0, ran.err
    out = tmp_path / "out"
    assert ran.json["student"]["pattern"] == "DFAF" and ran.json["ratio"] > 0
    assert ran.json["plan"]["keep"] == ["A#1"]
    assert f"wrote {out / 'report.html'}" in ran.err
    assert f"next: plait generate {out}" in ran.err and f"next: plait eval {out / 'distil'} ppl" in ran.err
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 5 and "gated_deltanet" in page and "times the teacher" in page
    assert plait("generate", str(out), "def ", "--max-tokens", "2").code == 0
    assert plait("eval", str(out / "distil"), "ppl").code == 0


def test_a_list_of_layers_that_stay_is_reported(plait, words, tmp_path):
    ran = plait("convert", *words, "--mixer", "D", "--keep", "A#1", "--budget", "640", "--json")
    assert ran.code == 0, ran.err
    assert "1 of 2 attention layers stay, chosen by list" in (tmp_path / "out" / "report.html").read_text()


def test_the_plan_alone_trains_nothing_and_is_gone_on_with(plait, words, tmp_path):
    ran = plait("convert", "plan", *words, "--mixer", "M", "--keep", "1", "--select", "kl", "--json")
    assert ran.code == 0, ran.err
    assert set(ran.json["plan"]["scores"]) == {"A#0", "A#1"}
    assert f"wrote {tmp_path / 'out' / 'plan.yaml'}" in ran.err
    assert not (tmp_path / "out" / "align").exists()
    (line,) = [line for line in ran.err.splitlines() if line.startswith("next: ")]
    assert line.startswith("next: plait convert /") and "--mixer M --keep 1 --select kl" in line
    assert plait("convert", *words, "--mixer", "M", "--keep", "1", "--select", "kl", "--stage", "transfer").code == 0
    assert (tmp_path / "out" / "transfer").is_dir() and not (tmp_path / "out" / "align").exists()


def test_more_is_measured_where_it_is_asked_for(plait, words, tmp_path, monkeypatch):
    from plait.evaluate import recall

    monkeypatch.setattr(recall, "LENGTHS", (256,))
    monkeypatch.setattr(recall, "PAIRS", (2,))
    monkeypatch.setattr(recall, "QUESTIONS", 1)
    ran = plait("convert", *words, "--to", "DF AF", "--budget", "640", "--measure", "recall,needle", "--json")
    assert ran.code == 0, ran.err
    assert set(ran.json["student"]["measured"]["needle, written"]) == {"256"}


def test_recall_chooses_where_records_are_trained_on(plait, words, tmp_path, monkeypatch):
    from plait.evaluate import recall

    monkeypatch.setattr(recall, "LENGTHS", (256,))
    monkeypatch.setattr(recall, "PAIRS", (2,))
    records = tmp_path / "records.jsonl"
    records.write_text('{"prompt": "1 + 1 = ", "completion": "2"}\n' * 200)
    words = [str(records) if word.endswith("text.txt") else word for word in words]
    ran = plait(
        "convert", "plan", *words, "--mixer", "D", "--keep", "1", "--select", "recall", "--budget", "640", "--json"
    )
    assert ran.code == 0, ran.err
    assert set(ran.json["plan"]["scores"]) == {"A#0", "A#1"}


def test_halo_looks_for_its_files_before_it_measures(plait, words, tmp_path, monkeypatch):
    monkeypatch.setattr("plait.evaluate.recall.measure", None)
    ran = plait(
        "convert", *words, "--mixer", "D", "--keep", "1", "--select", "halo", "--tasks", str(tmp_path), "--json"
    )
    assert ran.code == 1 and "no file of lm:arc_easy" in ran.json["error"], ran.json


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "DF AF", "--budget", "100"], "budget: 100 tokens leave 20 to align, less than one step of 64"),
        (["--to", "DF AF", "--budget", "some"], "--budget 'some': expected a number of tokens, such as 500k or 150M"),
        (["--to", "FM FD"], "has F#0 where the teacher has A#0"),
        ([], "say what takes attention's place"),
        (["--to", "DF AF", "--stage", "distill"], "there is no stage 'distill'; did you mean 'distil'?"),
        (["--to", "DF AF", "--measure", "recal"], "unknown measure 'recal'"),
        (["--to", "DF AF", "--measure", "ppl"], "unknown measure 'ppl'"),  # which every report has
        (["--to", "DF AF", "--measure", "lm:piqa"], "give their folder by --tasks"),
        (["--mixer", "D", "--select", "halo"], "give the folder of lm-eval's files by --tasks"),
        (["--mixer", "mamba2", "layers=3"], "layers"),
        (["--to", "DF AF", "--stage", "finish"], "--stage finish: nothing is asked for there; give finish_share=0.1"),
        (["--to", "DF AF", "--stage", "prune"], "--stage prune: nothing is asked for there; give prune=25%"),
        (
            ["--to", "DF AF", "--tasks", "."],
            "--tasks changes nothing here: it is for --measure lm:TASK and --select halo",
        ),
        (["--mixer", ""], "--mixer: there is no letter or kind ''"),
    ],
)
def test_what_cannot_be_is_said_in_a_line_and_leaves_nothing(plait, words, tmp_path, arguments, message):
    ran = plait("convert", *words, *arguments, "--json")
    assert ran.code == 1 and message in ran.json["error"], ran.json
    assert not (tmp_path / "out").exists()


def test_a_plan_alone_has_no_other_stage(plait, words):
    ran = plait("convert", "plan", *words, "--mixer", "M", "--stage", "align", "--json")
    assert ran.code == 1 and "--stage align: `plan` stops after the plan already" in ran.json["error"]


def test_a_mixer_that_takes_no_such_heads_says_which_it_can(plait, words, tmp_path):
    plan = tmp_path / "out" / "plan.yaml"
    assert plait("convert", "plan", *words, "--to", "DF AF").code == 0
    plan.write_text(plan.read_text().replace("heads: 1", "heads: 3", 1))
    ran = plait("convert", *words, "--to", "DF AF", "--json")
    assert (
        ran.code == 1
        and "gated_deltanet with heads 3 cannot take these weights; what can has heads 1" in ran.json["error"]
    )


def test_a_teacher_of_few_positions_is_measured_within_them(plait, words, tmp_path):
    few = library.ModelConfig(vocab=257, dim=64, pattern="(AF)2", front=library.Tokens(positions=36))
    library.save(library.build(few), tmp_path / "few", ByteTokenizer())
    words = [str(tmp_path / "few"), *words[1:], "--budget", "640", "--json"]
    for asked in (["--measure", "needle", "--to", "DF AF"], ["--select", "recall", "--mixer", "D"]):
        ran = plait("convert", *words, *asked)
        message = f"{' '.join(asked[:2])}: asks in texts of 512 tokens at least, and the teacher's positions end at 36"
        assert ran.code == 1 and message in ran.json["error"]
        assert not (tmp_path / "out").exists()
    ran = plait("convert", *words, "--to", "DF AF")
    assert ran.code == 0 and set(ran.json["student"]["measured"]["decode ms"]) == {"18"}
    assert (tmp_path / "out" / "report.html").read_text().count("<td>decode ms at 18</td>") == 1


def test_a_run_brings_its_own_text(run_folder, transformer, tmp_path):
    """The demo's transformer is held out on what it was not trained on."""
    from plait.cli.convert import conversion, known_data

    data = known_data(str(run_folder))
    assert data["source"].endswith("text.txt") and data["length"] == 32
    assert known_data(str(transformer)) == {}
    other = conversion(str(run_folder), str(tmp_path), str(tmp_path), "64k", {}, ["data.heldout=0.5"]).data
    assert other.to_dict() == data | {"source": str(tmp_path), "heldout": 0.5}, "what is not given stays the run's"


def test_the_key_table_is_in_the_help(plait):
    ran = plait("convert", "--help")
    assert ran.code == 0 and "align_share" in ran.out
