"""Wrong input is one line on stderr that says what would be right, and nothing else happens."""

import json

import pytest

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
    ("train",): (1, "design"),
    ("train", "missing.yaml"): (1, "no such file"),
    ("train", "design=AF", "stpes=3"): (1, "did you mean 'steps'"),
    ("train", "design=AF", "lr=fast"): (1, "lr"),
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
    assert not list(tmp_path.rglob("*.*"))


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
