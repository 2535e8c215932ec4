"""Wrong input is one line on stderr that says what would be right, and nothing else happens."""

import json
import os
import signal
import subprocess
import sys

import pytest

from plait.files import write_atomic

WRONG = {
    ("sho",): (2, "Did you mean 'show'"),
    ("show", "--jsn"): (2, "--json"),
    ("generate",): (2, "plait generate --help"),
    ("generate", "x", "y", "--seed", "one"): (2, "--seed"),
    ("show", "(MF"): (1, "column 4"),
    ("show", "[M|A]:gatd F"): (1, "did you mean 'gated'"),
    ("show", "Q"): (1, "GatedDeltaNet"),
    ("show", "small-hybird"): (1, "did you mean 'small-hybrid'"),
    ("show", "tiny", "dmi=3"): (1, "did you mean 'dim'"),
    ("show", "tiny", "layers.A.head=3"): (1, "did you mean 'heads'"),
    ("show", "tiny", "layers.A.heads=3"): (1, "heads 3"),
    ("show", "tiny", "dim"): (1, "key=value"),
    ("show", "tiny", "dim=[1"): (1, "YAML"),
    ("show", "missing.yaml"): (1, "no such file"),
    ("show", "."): (1, "expected a saved model or a run"),
    ("show", ""): (1, "column 1"),
    ("show", "AF\0"): (1, "expected a file's or folder's name"),
    ("show", "~no_such_user/x"): (1, "no such user"),
    ("show", "AF", "dim=1000000000"): (1, "at most 1,000,000, got 1,000,000,000"),
    ("show", "AF", "dim=-64"): (1, "dim must be above 0, got -64"),
    ("show", "AF", "vocab=0"): (1, "vocab must be above 0, got 0"),
    ("show", "AF", "vocab=1e40"): (1, "vocab must be at most"),
    ("show", "AF", "layers.F.hidden=1e17"): (1, "hidden must be at most"),
    ("show", "AF", "layers.A.rope.theta=.nan"): (1, "theta: expected a finite number, got nan"),
    ("show", "AF", "dim=64", "dim=128"): (1, "dim is given twice"),
    ("show", "AF", "import=no-module"): (1, "'no-module' is no module"),
    ("show", "AF", "import=no_module"): (1, "no_module: no such module"),
    ("show", "AF", "layers.A.kind=bespoke"): (1, "plait.register"),
    ("show", "(AF)-1"): (1, "column 5"),
    ("train", "tiny"): (1, "plait train design=tiny"),
    ("train", "."): (1, "run.yaml"),
    ("train", __file__): (1, "text to train on is data.source="),
    ("show", "(DF)3 AF", "heads=3"): (1, "unknown key 'heads'; did you mean 'layers.D.heads'"),
    ("show", "AF", "hidden=3"): (1, "did you mean 'layers.F.hidden'"),
    ("train", "design=(AF"): (1, "column 4"),
    ("train", "design=AF", "folder="): (1, "expected a file's or folder's name"),
    ("train", "design=AF", "design.dim=64", f"folder={__file__}"): (1, "File exists; expected a folder"),
    ("train", "design=AF", "lr=.inf"): (1, "lr: expected a finite number, got inf"),
    ("generate", "tiny", "x"): (1, "plait train design=tiny"),
    ("generate", ".", "x"): (1, "expected a saved model or a run"),
    ("eval", "(AF)2"): (1, 'plait train "design=(AF)2"'),
    ("eval", "x", "--import", "none.py"): (1, "none.py: no such file"),
    ("doctor", "(A"): (1, "column 3"),
    ("doctor", "AF", "--device", "tpu9"): (1, "tpu9"),
    ("train",): (1, "design"),
    ("train", "missing.yaml"): (1, "no such file"),
    ("train", "design=AF", "stpes=3"): (1, "did you mean 'steps'"),
    ("train", "design=AF", "lr=fast"): (1, "lr"),
    ("train", "start=nowhere"): (1, "start: nowhere: no such folder; expected a saved model or a training run"),
    ("train", "design=AF", "lora={rank:4}"): (1, "YAML wants a space after the colon: rank: 4"),
    ("generate", __file__, "x"): (1, "neither a model nor a run; expected a run's or a saved model's folder"),
    ("doctor", "AF", "--device", "meta"): (1, "device 'meta' holds no numbers; expected auto"),
    ("generate", "nowhere", "x"): (1, "no such folder"),
    ("eval", "nowhere", "ppl"): (1, "no such folder"),
    ("eval", "nowhere", "pll"): (1, "did you mean 'ppl'"),
    ("demo", "--text", "nowhere.txt"): (1, "nowhere.txt"),
    ("selfcheck", "--pattern", "(A"): (1, "column 3"),
    ("selfcheck", "--device", "tpu9"): (1, "tpu9"),
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_one_line_and_an_exit_code(plait, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    ran = plait(*arguments)
    code, words = WRONG[arguments]
    assert ran.code == code
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert words in ran.err
    assert not list(tmp_path.rglob("*"))
    again = plait(*arguments, "--json")
    assert (again.code, again.err) == (code, ran.err)
    assert json.loads(again.out) == {"error": ran.err.removeprefix("error: ").rstrip("\n"), "exit": code}


FILES = {
    "binary.yaml": b"\x00\x01\xff" * 9,
    "list.yaml": b"- a\n- b\n",
    "empty.yaml": b"",
    "tabs.yaml": b"a:\n\tb: 1\n",
    "twice.yaml": b"design: AF\nsteps: 1\nsteps: 2\n",
    "cut.json": b'{"design": "AF", "ste',
    "twice.json": b'{"design": "AF",\n "design": "AF"}',
    "nothing.yaml": b"design:\n",
}


@pytest.mark.parametrize("command", [("show",), ("train",), ("generate", "x"), ("eval",)], ids=" ".join)
@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_named(plait, tmp_path, command, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    ran = plait(command[0], str(path), *command[1:])
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
    assert ran.err.startswith(f"error: {path}")


def test_what_json_lacks_is_null():
    from plait.files import json_text

    assert json_text({"a": [float("nan"), (float("-inf"), 1.5)], "b": {"c": float("inf")}}) == (
        '{"a": [null, [null, 1.5]], "b": {"c": null}}'
    )


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_a_full_disk_under_standard_output_is_said(flag):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "plait", "show", "tiny", *flag]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "error: standard output: No space left on device"
    assert "Traceback" not in ended.stderr


def test_a_model_that_fits_no_memory_is_not_begun():
    import plait

    with pytest.raises(ValueError, match=r"needs .* TiB in float32, and cpu has"):
        plait.build(plait.ModelConfig(vocab=9, dim=1_000_000, pattern="(AF)999", layers={"F": {"kind": "gelu"}}))


def test_debug_shows_where_it_comes_from(plait):
    ran = plait("show", "(MF", "--debug")
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert "Traceback" not in plait("show", "(MF").err


def test_a_model_and_tokenizer_that_do_not_fit(plait, run_folder, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(run_folder / "checkpoints" / "step-000002", folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    ran = plait("generate", str(folder), "x")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert "cut short" in ran.err
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config)[:-20])
    assert "config.json" in plait("generate", str(folder), "x").err


@pytest.mark.parametrize("prompt", ["", "x"])
def test_prompts_and_options_are_checked(plait, run_folder, prompt):
    ran = plait("generate", str(run_folder), prompt, "--temperature", "-1" if prompt else "0")
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)


def test_an_unforeseen_error_is_one_line_too(plait, monkeypatch):
    from plait.cli import show

    def broken(*args, **kwargs):
        raise KeyError("boom")

    monkeypatch.setattr(show, "load_design", broken)
    ran = plait("show", "tiny")
    assert ran.code == 1
    assert ran.err == "error: KeyError: 'boom' (not foreseen; --debug shows where)\n"


def test_interrupted_is_130(plait, monkeypatch):
    from plait.cli import show

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(show, "load_design", interrupted)
    ran = plait("show", "tiny")
    assert (ran.code, ran.err) == (130, "error: interrupted\n")


def test_terminated_is_143_and_leaves_nothing_half_written(plait, monkeypatch, tmp_path):
    from plait.cli import show

    def write(path):
        path.write_text("{", encoding="utf-8")
        signal.raise_signal(signal.SIGTERM)

    def terminated(*args, **kwargs):
        try:
            write_atomic(tmp_path / "config.json", write)
        finally:
            signal.raise_signal(signal.SIGTERM)  # as some send it twice

    monkeypatch.setattr(show, "load_design", terminated)
    before = signal.getsignal(signal.SIGTERM)
    ran = plait("show", "tiny", "--json")
    assert (ran.code, ran.err) == (143, "error: terminated\n")
    assert ran.json == {"error": "terminated", "exit": 143}
    assert not any(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) is before
