"""A run as data: what is read is what is written, and what is wrong is said in one line."""

import subprocess
import sys

import pytest
import yaml

from plait.train import RunConfig, load_run
from plait.train.config import FIXED, FREE, resolve_design, to_yaml

MINIMAL = {"design": "(DF)3 AF"}


@pytest.mark.parametrize(
    "data",
    [
        MINIMAL,
        {"design": {"dim": 64, "pattern": "[M|A]F", "layers": {"A": {"kind": "attention", "kv_heads": 1}}}},
        {"design": "tiny", "data": {"tokenizer": {"bpe": 4096}}, "betas": [0.8, 0.9], "clip": None, "resume": True},
    ],
)
def test_yaml_in_is_yaml_out(data):
    run = RunConfig.from_dict(data)
    text = to_yaml(run)
    assert RunConfig.from_dict(yaml.safe_load(text)) == run
    assert to_yaml(RunConfig.from_dict(yaml.safe_load(text))) == text


def test_every_key_is_spelled_out_in_what_is_written():
    written = RunConfig.from_dict(MINIMAL).to_dict()
    assert set(written) == set(RunConfig.__struct_fields__)
    assert written["data"]["length"] == 512


def test_every_key_is_documented():
    for name in RunConfig.__struct_fields__:
        assert name in RunConfig.__doc__
    assert set(FIXED) | set(FREE) <= set(RunConfig.__struct_fields__)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stepz": 3}, "did you mean 'steps'?"),
        ({"data": {"lenght": 3}}, "data: unknown key 'lenght'; did you mean 'length'?"),
        ({"data": {"heldout": 1.5}}, "data.heldout must be between 0 and 1, got 1.5"),
        ({"data": {"tokenizer": {"bpe": 100}}}, "at least 257"),
        ({"data": {"tokenizer": {"bpee": 300}}}, "did you mean 'bpe'?"),
        ({"optimizer": "adam"}, "did you mean 'adamw'?"),
        ({"schedule": "cosin"}, "did you mean 'cosine'?"),
        ({"precision": "float16"}, "did you mean 'bfloat16'?"),
        ({"steps": 0}, "steps must be above 0"),
        ({"lr": "fast"}, "lr: expected a number, got 'fast'"),
        ({"batch": 6, "accumulate": 4}, "4 does not divide batch 6"),
        ({"warmup": 2000}, "do not fit into steps 1000"),
        ({"schedule": "wsd", "warmup": 0.5, "decay": 0.6}, "do not fit"),
        ({"betas": [0.9, 1.0]}, "betas must be in [0, 1)"),
        ({"lr_end": 2.0}, "between 0 and 1"),
        ({"design": 3}, "expected a pattern"),
    ],
)
def test_a_wrong_value_is_one_line(change, said):
    with pytest.raises(ValueError, match=".") as caught:
        RunConfig.from_dict(MINIMAL | change)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_design_says_so():
    with pytest.raises(ValueError, match="'design' is missing"):
        RunConfig.from_dict({"steps": 3})


def test_a_file_names_its_folder_and_overrides_reach_in(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("design: {dim: 64, pattern: AF}\nlr: 3e-4\nsteps: 50\n")
    run = load_run(path, **{"steps": 70, "data.length": 32, "design.dim": 128})
    assert (run.folder, run.lr, run.steps, run.data.length) == ("runs/small", 3e-4, 70, 32)
    assert run.design == {"dim": 128, "pattern": "AF"}
    with pytest.raises(ValueError, match="small.yaml: run: unknown key 'step'; did you mean 'steps'"):
        load_run(path, step=3)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_run(tmp_path / "smal.yaml")


def test_a_run_folder_that_was_moved_is_its_own_folder(tmp_path):
    (tmp_path / "run.yaml").write_text(to_yaml(RunConfig(design="AF", folder="runs/elsewhere")))
    assert load_run(tmp_path).folder == str(tmp_path)


def test_the_vocabulary_is_the_tokenizers_where_the_design_leaves_it_out(tmp_path):
    assert resolve_design("AF", 257).vocab == 257
    assert resolve_design("small-hybrid", 4096).vocab == 4096
    assert resolve_design({"dim": 64, "pattern": "AF"}, 300).vocab == 300
    assert resolve_design({"dim": 64, "pattern": "AF", "vocab": 320}, 300).vocab == 320
    with pytest.raises(ValueError, match="design.vocab 256 is smaller than the tokenizer's 257"):
        resolve_design({"dim": 64, "pattern": "AF", "vocab": 256}, 257)
    file = tmp_path / "design.yaml"
    file.write_text("{dim: 64, pattern: AF, vocab: 400}")
    assert resolve_design(str(file), 257).vocab == 400


def test_reading_a_run_needs_no_torch():
    code = "import sys, plait.train as t; t.load_run; t.latest; t.Interrupted; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
