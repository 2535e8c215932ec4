import pytest

from plait.design import PRESETS, load_design
from plait.design.count import flops_per_token, parameters, state_bytes
from plait.design.layers import LETTERS


def test_without_a_design_it_lists_presets_and_letters(plait):
    ran = plait("show")
    assert ran.code == 0
    for word in (*PRESETS, "Mamba2", "GatedDeltaNet", "merge_attention", "[D|A]"):
        assert word in ran.out
    assert set(plait("show", "--json").json["presets"]) == set(PRESETS)


def test_a_pattern_is_counted_slot_by_slot(plait):
    ran = plait("show", "((DF)3 AF)2", "dim=128", "vocab=1000", "layers.A.kv_heads=1")
    assert ran.code == 0
    design = load_design("((DF)3 AF)2", **{"dim": 128, "vocab": 1000, "layers.A": {"kind": "attention", "kv_heads": 1}})
    for word in ("((DF)3 AF)2", "D#5", "A#1", "F#7", "front", "head", "16 slots", "128k"):
        assert word in ran.out
    data = plait("show", "((DF)3 AF)2", "dim=128", "vocab=1000", "layers.A.kv_heads=1", "--json").json
    assert data["hash"] == design.hash
    assert data["parameters"] == parameters(design)
    assert data["flops_per_token"]["4k"] == flops_per_token(design, 4096)
    assert data["state_bytes"]["128k"] == state_bytes(design, 131_072)
    assert [slot["address"] for slot in data["slots"]] == [slot.address for slot in design.slots]


def test_beside_a_transformer_of_its_width(plait):
    data = plait("show", "((DF)3 AF)2", "dim=128", "vocab=1000", "--context", "5000", "--json").json
    transformer = load_design("(AF)8", dim=128, vocab=1000)
    assert data["transformer"]["pattern"] == "(AF)8"
    assert data["transformer"]["parameters"] == parameters(transformer)
    assert data["transformer"]["flops_per_token"]["5,000"] == flops_per_token(transformer, 5000)
    assert data["flops_per_token"]["5,000"] > data["flops_per_token"]["4k"]
    assert data["transformer"]["state_bytes"]["5,000"] == state_bytes(transformer, 5000)
    odd = plait("show", "AF", "dim=40", "layers.A.heads=2", "--json")  # no default heads: nothing to compare with
    assert odd.code == 0 and odd.json["transformer"] is None


def test_every_letter_with_layer_state_and_source(plait):
    ran, data = plait("show", "--letters"), plait("show", "--letters", "--json").json["letters"]
    assert set(data) == set(LETTERS)
    assert all(letter["what"] and letter["state"] for letter in data.values())
    assert "Attention, window 512" in ran.out and "arXiv 2412.06464" in ran.out
    assert data["W"]["state_bytes"]["1k"] == data["W"]["state_bytes"]["128k"] < data["A"]["state_bytes"]["1k"]


def test_a_model_too_wide_to_be_built_is_only_counted(plait):
    assert plait("show", "(AF)100", "dim=16384", "--json").json["parameters"] > 10**11


def test_branches_are_shown(plait):
    out = plait("show", "[M|A]F", "dim=64").out
    assert "par#0" in out and "Mamba2 | Attention, Average" in out


def test_brackets_in_a_change_are_no_yaml_list(plait):
    assert plait("show", "tiny", "pattern=[D|A]", "--json").json["pattern"] == "[D|A]"


@pytest.mark.parametrize("name", ["design.yaml", "run.yaml"])
def test_files_hold_designs_or_runs(plait, tmp_path, name):
    text = "vocab: 300\ndim: 64\npattern: DF AF\n"
    path = tmp_path / name
    path.write_text(
        text if name == "design.yaml" else "design:\n  " + text.replace("\n", "\n  ").rstrip() + "\nsteps: 3\n"
    )
    assert plait("show", str(path), "--json").json["design"]["vocab"] == 300


def test_a_run_and_its_model_are_shown(plait, run_folder):
    shown = plait("show", str(run_folder), "--json").json
    assert shown["pattern"] == "DFAF"
    assert shown["hash"] == plait("show", str(run_folder / "checkpoints" / "step-000002"), "--json").json["hash"]


def test_what_to_run_next_trains_what_was_shown(plait):
    assert 'next: plait train "design=(DF)2 AF" design.dim=64' in plait("show", "(DF)2 AF", "dim=64").err


def test_a_model_is_shown_with_a_line_that_generates(plait, run_folder):
    for spec in (run_folder, run_folder / "checkpoints" / "step-000002"):
        assert f"next: plait generate {spec} " in plait("show", str(spec)).err
        changed = plait("show", str(spec), "layers.A.kv_heads=1")
        assert f"next: plait train design={spec} design.layers.A.kv_heads=1" in changed.err


@pytest.mark.parametrize(
    ("tokenizer", "vocab"), [("", 257), ("\n  tokenizer: {bpe: 700}", 700), ("\n  tokenizer: TOK", 257)]
)
def test_a_run_is_sized_before_it_is_trained(plait, tmp_path, tokenizer, vocab):
    from plait.data import load_tokenizer

    load_tokenizer("bytes").save(tmp_path / "tok")
    path = tmp_path / "a.yaml"
    text = tokenizer.replace("TOK", str(tmp_path / "tok"))
    path.write_text(f"design: (AF)3\nsteps: 7\nbatch: 4\ndata:\n  source: nowhere.txt\n  length: 32{text}\n")
    ran = plait("show", str(path), "dim=128", "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["design"]["vocab"], ran.json["design"]["dim"]) == (vocab, 128)
    assert ran.json["run"]["tokens"] == 7 * 4 * 32
    assert f"next: plait train {path} design.dim=128" in ran.err
    assert plait("show", str(path), "vocab=999", "--json").json["design"]["vocab"] == 999


def test_a_run_that_has_no_checkpoint_yet_is_shown(plait, tmp_path):
    (tmp_path / "run.yaml").write_text("design: AF\n")
    ran = plait("show", str(tmp_path), "--json")
    assert (ran.json["design"]["vocab"], ran.json["pattern"]) == (257, "AF")
    assert f"next: plait train {tmp_path}" in ran.err
