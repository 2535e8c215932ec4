"""The commands that do the work, on a model of two steps."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from plait.ops.kernels import OPS, forced


def test_train_says_how_to_go_on(plait, run_folder):
    ran = plait("train", str(run_folder), "--json")
    assert ran.code == 0
    assert len(ran.out.splitlines()) == 1
    assert ran.json["step"] == 2
    assert ran.json["bits_per_byte"] > 0
    assert f"next: plait generate {run_folder}" in ran.err


def test_train_takes_changes_only(plait, tmp_path, run_folder):
    text = run_folder.parent / "text.txt"
    ran = plait(
        *("train", "design=tiny", "design.dim=64", f"folder={tmp_path}/x", f"data.source={text}", "data.length=16"),
        *(f"data.cache={tmp_path}/cache", "steps=1", "batch=1", "eval_tokens=16", "device=cpu", "--json"),
    )
    assert ran.code == 0, ran.err
    config = json.loads((tmp_path / "x" / "checkpoints" / "step-000001" / "config.json").read_text())
    assert (config["design"]["dim"], config["design"]["pattern"]) == (64, "DF AF DF AF")


def test_train_reaches_into_a_file_s_design(run_folder, tmp_path):
    from plait.cli.train import run_config

    (tmp_path / "a.yaml").write_text('design: "[M|A]F"\nsteps: 7\n')
    run = run_config([str(tmp_path / "a.yaml"), "design.dim=64", "design.layers.A.kv_heads=1", "lr=3e-4"])
    assert (run.steps, run.lr, run.folder) == (7, 3e-4, "runs/a")
    assert run.design["layers"]["A"] == {"kind": "attention", "kv_heads": 1}
    assert (run.design["pattern"], run.design["dim"]) == ("[M|A]F", 64)


def test_generate_prints_the_continuation(plait, run_folder):
    import plait as library

    asked = ("generate", str(run_folder), "def ", "--max-tokens", "8", "--device", "cpu")
    ran = plait(*asked)
    assert ran.code == 0
    model, tokenizer = library.load(run_folder), library.load_tokenizer(run_folder / "checkpoints" / "step-000002")
    expected = library.generate(model, tokenizer, "def ", max_tokens=8)
    assert ran.out == expected + "\n"
    again = plait(*asked, "--json")
    assert again.json["text"] == expected
    assert len(again.out.splitlines()) == 1
    assert expected in again.err


def test_weights_are_read_in_the_dtype_that_is_asked_for(plait, run_folder):
    import plait as library

    asked = ("generate", str(run_folder), "def ", "--max-tokens", "8", "--device", "cpu", "--dtype")
    model, tokenizer = library.load(run_folder, dtype=torch.bfloat16), library.load_tokenizer(run_folder)
    assert plait(*asked, "bfloat16").out == library.generate(model, tokenizer, "def ", max_tokens=8) + "\n"
    exact, rounded = (
        plait("eval", str(run_folder), "--json", "--dtype", dtype).json for dtype in ("float32", "bfloat16")
    )
    assert exact["perplexity"] != rounded["perplexity"] == pytest.approx(exact["perplexity"], rel=0.01)
    assert "bfloat16" in plait(*asked, "bfloat").err


def test_generate_samples_by_seed_and_reads_stdin(plait, run_folder, monkeypatch):
    asked = (
        "generate",
        str(run_folder),
        "-",
        "--max-tokens",
        "8",
        "--temperature",
        "1",
        "--top-k",
        "50",
        "--device",
        "cpu",
    )
    texts = []
    for seed in ("1", "1", "2"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("x = "))
        ran = plait(*asked, "--seed", seed, "--json")
        assert ran.json["prompt"] == "x = "
        texts.append(ran.json["text"])
    assert texts[0] == texts[1] != texts[2]


def test_doctor_names_every_op_and_form(plait):
    ran = plait("doctor", "--json")
    assert ran.code == 0
    ops = set(OPS)
    forms = {(row["op"], row["form"]) for row in ran.json["kernels"]}
    assert {op for op, _ in forms} == ops
    assert all((op, "reference") in forms for op in ops)
    assert {row["op"] for row in ran.json["kernels"] if row["reason"] == "used"} == ops
    assert ran.json["devices"][0]["device"] == "cpu"


def test_doctor_of_a_design_names_its_ops_with_reasons(plait):
    asked = ("doctor", "M[H|A]F", "dim=64", "--device", "cpu", "--json")
    ran = plait(*asked)
    assert ran.code == 0
    rows = ran.json["kernels"]
    assert {(row["op"], row["letters"]) for row in rows} == {
        ("conv", "M H"),
        ("ssd", "M"),
        ("shooting", "H"),
        ("attention", "A"),
        ("packed_attention", "A"),
        ("paged_attention", "A"),
        ("write_pages", "A"),
    }
    used = [(row["form"], row["when"]) for row in rows if row["op"] == "ssd" and row["reason"] == "used"]
    assert used == [("step", "decoding"), ("chunked", "drafts, prompts, training, packed training")]
    with forced("ssd=step"):
        refused = [row for row in plait(*asked).json["kernels"] if row["op"] == "ssd" and row["form"] == "step"]
    assert [row["reason"] for row in refused] == ["used, forced", "only for a single token"]


def test_a_selfcheck_that_is_stopped_shows_what_was_checked(plait, monkeypatch):
    from plait.evaluate import selfcheck as module

    def stopped(checks, jobs):
        yield module._run(*checks[0])
        signal.raise_signal(signal.SIGTERM)
        yield module._run(*checks[1])

    monkeypatch.setattr(module, "_results", stopped)
    before = signal.getsignal(signal.SIGTERM)
    ran = plait("selfcheck", "--device", "cpu", "--pattern", "DF", "--law", "causal", "--json")
    assert (ran.code, ran.json["passed"], ran.json["not_done"], len(ran.json["results"])) == (1, False, 1, 1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_selfcheck_passes_and_fails(plait, monkeypatch):
    asked = ("selfcheck", "--device", "cpu", "--pattern", "DF", "--law", "causal", "--dtype", "float32", "--json")
    ran = plait(*asked)
    assert ran.code == 0
    assert ran.json["passed"]
    assert [result["law"] for result in ran.json["results"]] == ["causal"]
    from plait.evaluate import laws

    def broken(*arguments):
        raise RuntimeError("the kernel died")

    monkeypatch.setitem(laws.LAWS, "causal", broken)
    ran = plait(*asked)
    assert ran.code == 1
    assert not ran.json["passed"]
    assert ran.json["results"][0]["error"] is None
    assert "the kernel died" in ran.err


def test_demo_writes_a_report(plait, run_folder, tmp_path, monkeypatch):
    from plait.study import Study
    from plait.study import demo as settings
    from plait.train import train

    def small(text: str, folder: str) -> Study:
        full = demo_study(text, folder).to_dict()
        training = full["training"] | {"batch": 1, "eval_tokens": 64}
        data = full["data"] | {"length": 32, "tokenizer": "bytes"}
        smaller = {"dim": 64, "tokens": 64, "parameters": 400_000, "decode_contexts": [8, 64], "sample_tokens": 4}
        return Study(**(full | smaller | {"training": training, "data": data}))

    def train_here(runs, jobs, threads, console):
        """In this process: those of their own have their tests with the studies."""
        for run in runs.values():
            train(run, console=console)

    demo_study = settings.demo_study
    monkeypatch.setattr(settings, "demo_study", small)
    monkeypatch.setattr("plait.study.run.train_all", train_here)
    ran = plait("demo", "--text", str(run_folder.parent / "text.txt"), "--out", str(tmp_path / "demo"), "--json")
    assert ran.code == 0, ran.err
    assert [model["pattern"] for model in ran.json["models"]] == list(settings.PATTERNS.values())
    assert f"wrote {tmp_path}/demo/report.html" in ran.err
    assert "next: plait generate" in ran.err
    assert "text.txt" in (tmp_path / "demo" / "report.html").read_text()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_saves_and_says_how_to_go_on(run_folder, tmp_path):
    arguments = [
        *(
            "train",
            "design=AF",
            "design.dim=64",
            f"folder={tmp_path}/long",
            "steps=100000",
            "batch=1",
            "data.length=16",
        ),
        *(f"data.source={run_folder.parent}/text.txt", f"data.cache={tmp_path}/cache", "device=cpu", "eval_tokens=16"),
    ]
    program = f"from plait.cli import main; main({arguments!r})"
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "long" / "metrics.jsonl"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert f"plait train {tmp_path}/long" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert list((tmp_path / "long" / "checkpoints").glob("step-*"))


def test_eval_gives_the_number_that_training_gave(plait, run_folder, tmp_path):
    trained = plait("train", str(run_folder), "--json").json
    asked = ("eval", str(run_folder), "ppl", "--device", "cpu")
    ran = plait(*asked, "--json")
    assert ran.code == 0
    assert (ran.json["context"], ran.json["bits_per_byte"], ran.json["loss"]) == (
        32,
        pytest.approx(trained["bits_per_byte"], rel=1e-9),
        pytest.approx(trained["heldout_loss"], rel=1e-9),
    )
    way = "in pieces of 32 tokens, each read from an empty state, the first 64 tokens and the rest of their last piece"
    assert ran.json["how"] == way
    assert f"measured {way}" in plait(*asked).out
    assert plait(*asked, "--tokens", "8", "--json").json["tokens"] == 32
    assert plait(*asked, "--tokens", "100000", "--json").json["tokens"] > ran.json["tokens"]


def test_what_generate_says_to_run_next_runs_for_a_model_of_no_run(plait, run_folder, tmp_path):
    from plait import load, load_tokenizer, save

    save(load(run_folder), tmp_path / "given", load_tokenizer(run_folder))
    for model in (run_folder, tmp_path / "given"):
        said = plait("generate", str(model), "def ", "--max-tokens", "2").err
        (following,) = (line for line in said.splitlines() if line.startswith("next: plait "))
        ran = plait(*shlex.split(following.removeprefix("next: plait ")), "--tokens", "40")
        assert ran.code == 0, ran.err


def test_generate_needs_nothing_of_the_run_but_its_model(plait, run_folder, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "copy")
    (copy / "run.yaml").write_text("steps: [", encoding="utf-8")
    ran = plait("generate", str(copy), "def ", "--max-tokens", "2", "--json")
    assert ran.code == 0, ran.err
    assert "text" in ran.json


def test_eval_measures_any_text_as_it_measures_held_out_text(plait, run_folder, tmp_path):
    from plait.data import Shards, load_tokenizer, prepare
    from plait.train import load_run
    from plait.train.heldout import heldout_documents

    run = load_run(run_folder)
    tokenizer = load_tokenizer(run_folder / "tokenizer")
    shards: Shards = prepare(run.data.source, tokenizer, run.data.cache, heldout=run.data.heldout)
    for number, document in enumerate(heldout_documents(shards)):
        (tmp_path / f"{number}.txt").write_text(tokenizer.decode(next(document)[:-1]), newline="")
    (tmp_path / "none.txt").write_text("")
    (tmp_path / "other.bin").write_bytes(bytes(range(256)))
    asked = ("eval", str(run_folder), "--device", "cpu", "--json")
    own = plait(*asked, "--tokens", "1000000").json
    again = plait(*asked, "--text", str(tmp_path)).json
    assert (again["tokens"], again["bytes"]) == (own["tokens"], own["bytes"])
    assert again["bits_per_byte"] == pytest.approx(own["bits_per_byte"], rel=1e-6)


def test_eval_of_a_broken_model_is_one_line_and_names_the_weight(plait, run_folder, tmp_path):
    import torch

    import plait as library

    model = library.load(run_folder)
    with torch.no_grad():
        model.slots[2].norm.weight.fill_(float("nan"))
    library.save(model, tmp_path / "model", tokenizer=library.load_tokenizer("bytes"))
    (tmp_path / "a.txt").write_text("x = 1\n" * 9)
    ran = plait("eval", str(tmp_path / "model"), "--text", str(tmp_path / "a.txt"), "--device", "cpu", "--json")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert "the model is broken: its loss on this text is nan; the weights of A#0 " in ran.err


def test_a_damaged_checkpoint_is_refused_and_the_one_before_named(plait, run_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    older, newer = (folder / "checkpoints" / f"step-{step:06d}" for step in (1, 2))
    shutil.copytree(newer, older)
    weights = bytearray((newer / "model.safetensors").read_bytes())
    weights[-400:-396] = b"plai"
    (newer / "model.safetensors").write_bytes(weights)
    for asked in (("generate", str(folder), "x"), ("eval", str(folder))):
        ran = plait(*asked, "--device", "cpu")
        assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
        assert f"{newer}/model.safetensors is damaged or cut short: the newest whole checkpoint is {older}" in ran.err


def test_a_finished_run_says_so_and_writes_nothing(plait, run_folder):
    ran = plait("train", str(run_folder))
    assert (ran.code, "wrote" in ran.err) == (0, False)
    assert f"nothing to do: all 2 steps of {run_folder} are done" in ran.out


def test_a_design_that_has_weights_says_that_they_are_not_used(plait, run_folder, tmp_path):
    more = [
        f"folder={tmp_path}/x",
        f"data.source={run_folder.parent}/text.txt",
        f"data.cache={run_folder.parent}/cache",
    ]
    more += ["data.length=16", "steps=1", "batch=1", "eval_tokens=16", "sample_every=0", "device=cpu"]
    ran = plait("train", f"design={run_folder}/checkpoints/step-000002", *more)
    assert ran.code == 0, ran.err
    assert "its design is used, its weights are not; to go on from those: start=" in ran.out


def test_a_run_goes_on_from_another_directory(plait, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "t.txt").write_text("def one():\n    return 1\n\n" * 99)
    asked = ["design=AF", "design.dim=64", "data.source=t.txt", "data.length=16", "batch=1", "eval_tokens=16"]
    monkeypatch.chdir(tmp_path / "a")
    assert plait("train", *asked, "folder=run", "steps=1", "sample_every=0", "device=cpu").code == 0
    monkeypatch.chdir(tmp_path / "b")
    (tmp_path / "b" / "t.txt").write_text("another text")
    assert plait("eval", "../a/run", "--device", "cpu").code == 0
    ran = plait("train", "../a/run", "steps=2", "resume=true", "--json")
    assert (ran.code, ran.json["step"]) == (0, 2)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["t.txt"]


def test_the_help_of_train_has_every_key_and_its_default(plait):
    import msgspec

    from plait.train import DataConfig, RunConfig

    text = " ".join(plait("train", "--help").out.split())
    said = text.replace("data.", "").split()
    for config in (RunConfig, DataConfig):
        for field in msgspec.structs.fields(config):
            if isinstance(field.default, int | float):
                assert f"{field.name}={json.dumps(field.default)}" in said
    for words in ('betas="[0.9, 0.95]"', 'sample_prompt="def "', "data.source=stdlib", "decay: how long those take"):
        assert words in text


def test_eval_says_how_recurrent_layers_were_solved(plait, tmp_path):
    import plait as library

    design = {"vocab": 257, "dim": 64, "pattern": "G [A|H]"}
    design["layers"] = {"H": {"kind": "lstm", "tol": 1e-30, "max_passes": 1}}
    library.save(library.build(design), tmp_path / "model", tokenizer=library.load_tokenizer("bytes"))
    (tmp_path / "a.txt").write_text("def one():\n    return 1\n" * 40)
    asked = ("eval", str(tmp_path / "model"), "ppl", "--text", str(tmp_path / "a.txt"), "--device", "cpu")
    ran = plait(*asked, "--json")
    assert ran.code == 0, ran.err
    told = ran.json["solver"]
    assert list(told) == ["G#0", "H#0"]
    assert told["G#0"] | {"passes": 0, "gap": 0} == {"calls": 2, "passes": 0, "gap": 0, "fell_back": 0}
    assert 1 < told["G#0"]["passes"] <= 8
    assert (told["H#0"]["passes"], told["H#0"]["fell_back"]) == (1, 2)
    rows = [line.split("│")[1:-1] for line in plait(*asked).out.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row][:2] for row in rows] == [["G#0", "2"], ["H#0", "2"]]


def test_eval_of_a_model_without_a_run_needs_text(plait, run_folder, tmp_path):
    shutil.copytree(run_folder / "checkpoints" / "step-000002", tmp_path / "model")
    ran = plait("eval", str(tmp_path / "model"))
    assert (ran.code, "give --text" in ran.err) == (1, True)
    for name, text in (("empty.txt", b""), ("binary.txt", b"\0\xff" * 9)):
        (tmp_path / name).write_bytes(text)
        ran = plait("eval", str(tmp_path / "model"), "--text", str(tmp_path / name))
        assert (ran.code, ran.err.count("\n"), name in ran.err) == (1, 1, True)


def test_a_run_is_found_by_its_folder_file_or_checkpoint(plait, run_folder, tmp_path):
    asked = ("x", "--max-tokens", "3", "--device", "cpu", "--json")
    (tmp_path / "small.yaml").write_text(f"design: AF\nfolder: {run_folder}\n")
    checkpoint = run_folder / "checkpoints" / "step-000002"
    found = (
        *(run_folder, run_folder / "run.yaml", run_folder / "checkpoints", checkpoint, checkpoint / "config.json"),
        tmp_path / "small.yaml",
    )
    assert {plait("generate", str(spec), *asked).json["model"] for spec in found} == {str(checkpoint)}
    assert plait("eval", str(tmp_path / "small.yaml"), "--device", "cpu", "--json").json["model"] == str(checkpoint)
    ran = plait("train", str(checkpoint))
    assert (ran.code, f"plait train {run_folder}" in ran.err, "design=" in ran.err) == (1, True, True)
    (tmp_path / "small.yaml").write_text(f"design: AF\nfolder: {tmp_path}/none\n")
    assert "not trained yet" in plait("generate", str(tmp_path / "small.yaml"), "x").err


def test_a_run_s_design_may_be_another_s(run_folder, tmp_path):
    from plait.cli.train import run_config
    from plait.train.config import resolve_design

    (tmp_path / "design.yaml").write_text("dim: 64\npattern: DF AF\n")
    (tmp_path / "run.yaml").write_text("design: {dim: 64, pattern: DF AF}\n")
    found = (
        run_folder,
        run_folder / "checkpoints" / "step-000002",
        tmp_path / "design.yaml",
        tmp_path / "run.yaml",
        tmp_path,
    )
    assert len({resolve_design(run_config([f"design={spec}"]).design, 257).hash for spec in found}) == 1
    for spec in found:
        run = run_config([f"design={spec}", "design.layers.A.kv_heads=1"])
        assert resolve_design(run.design, 257).place("A#0").layer.kv_heads == 1


def test_home_is_home(plait, run_folder, tmp_path, monkeypatch):
    import plait as library

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    shutil.copytree(run_folder, tmp_path / "small")
    shutil.copy(run_folder.parent / "text.txt", tmp_path / "t.txt")
    (tmp_path / "d.yaml").write_text("{dim: 64, pattern: AF}\n")
    library.save(library.load("~/small"), "~/model", library.load_tokenizer("~/small/tokenizer"))
    ran = plait(
        *("train", "design=~/d.yaml", "folder=~/runs/x", "data.source=~/t.txt", "data.cache=~/cache", "device=cpu"),
        *("data.tokenizer=~/small/tokenizer", "data.length=16", "steps=1", "batch=1", "warmup=0", "eval_tokens=16"),
    )
    assert ran.code == 0, ran.err
    for asked in (
        *(("show", "~/d.yaml", "vocab=9"), ("show", "~/model"), ("show", "~/runs/x/run.yaml"), ("train", "~/runs/x")),
        *(("generate", "~/model", "x", "--max-tokens", "1"), ("eval", "~/model", "--text", "~/t.txt", "--tokens", "9")),
    ):
        ran = plait(*asked)
        assert ran.code == 0, ran.err
    assert {path.name for path in tmp_path.iterdir()} == {"work", "small", "t.txt", "d.yaml", "model", "runs", "cache"}
    assert not list((tmp_path / "work").iterdir())
