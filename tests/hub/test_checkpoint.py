"""Folders of transformers: what is wrong with one is said in a line, and nothing is lost on the way through plait."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import plait
from plait.hub.parity import quiet
from plait.model.weight_files import INDEX, WEIGHTS

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TOKENS = torch.arange(12)[None] * 5 % 61


def llama(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> LlamaForCausalLM:
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, **more)).to(dtype).eval()
        model.save_pretrained(folder, max_shard_size="40KB" if more.get("tie_word_embeddings") else "5GB")
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")


def shorter(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]


def eighth(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not to be opened")


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "renamed": (lambda f: rewrite(f, renamed), r"missing tensors \['model.layers.0.mlp.up_proj.weight'\], unused"),
    "shorter": (lambda f: rewrite(f, shorter), r"model.norm.weight has shape \(31,\), the config asks for \(32,\)"),
    "eighth": (lambda f: rewrite(f, eighth), "model.norm.weight is F8_E4M3; expected one of F64"),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "corrupt or cut short"),
    "pickle": (pickled, "pytorch_model.bin: a pickle, which runs code"),
    "newer": (lambda f: edit(f, attention_twist=3), "plait does not know 'attention_twist'"),
    "activation": (lambda f: edit(f, hidden_act="gelu"), "hidden_act 'gelu' is not supported; plait reads 'silu'"),
    "scaling": (
        lambda f: edit(f, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope_type 'dynamic' is not supported",
    ),
    "quantised": (lambda f: edit(f, quantization_config={"quant_method": "gptq"}), "quantised by 'gptq' are not read"),
    "quantised, in a word": (lambda f: edit(f, quantization_config="fp8"), "quantised by 'fp8' are not read"),
    "quantised, MLX": (lambda f: edit(f, quantization={"bits": 4}), "quantised by 'some method' are not read"),
    "quantised inside": (
        lambda f: edit(f, text_config={"quantization_config": {"quant_method": "awq"}}),
        "quantised by 'awq' are not read",
    ),
    "family": (lambda f: edit(f, model_type="lama"), "no family 'lama'; did you mean 'llama'"),
    "no family": (lambda f: edit(f, model_type=None), "'model_type' is missing"),
    "mamba_ssm": (
        lambda f: edit(f, model_type=None, ssm_cfg={"layer": "Mamba2"}),
        "this one is of the mamba_ssm package",
    ),
    "heads": (lambda f: edit(f, num_attention_heads=5), "not a config of llama: .*number of attention heads"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_a_line(folder: Path, what: str) -> None:
    damage, message = WRONG[what]
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        plait.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shards_are_read_and_a_missing_one_is_named(tmp_path: Path) -> None:
    theirs = llama(tmp_path, tie_word_embeddings=True)
    shards = sorted(set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values()))
    assert len(shards) > 2
    assert torch.allclose(plait.load(tmp_path)(TOKENS)[0], theirs(TOKENS).logits, atol=1e-5)  # float32, two layers
    (tmp_path / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[1]}: missing"):
        plait.load(tmp_path)


def test_a_tied_head_that_is_written_twice(folder: Path) -> None:
    edit(folder, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head.weight is not the embeddings"):
        plait.load(folder)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert plait.load(folder).lm_head is None


def test_dtypes_are_kept_there_and_back(tmp_path: Path) -> None:
    llama(tmp_path / "bf16", dtype=torch.bfloat16)
    model = plait.load(tmp_path / "bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    plait.export(model, tmp_path / "back")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("bf16", "back"))
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert plait.load(tmp_path / "bf16", dtype=torch.float32).dtype == torch.float32


def test_a_model_remembers_where_it_is_from(folder: Path, tmp_path: Path) -> None:
    """Through a folder of plait's, and a change that the family has room for."""
    edit(folder, initializer_range=0.03, rms_norm_eps=1e-3)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    plait.save(plait.swap(plait.load(folder), {"F#1": {"hidden": 48}}), tmp_path / "ours")
    plait.export(plait.load(tmp_path / "ours"), tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["initializer_range"], config["rms_norm_eps"], config["model_type"]) == (0.03, 1e-3, "llama")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize(
    ("design", "message"),
    [
        ({"pattern": "AF DF"}, "llama cannot hold D#0: it is a gated_deltanet, and llama has attention, swiglu"),
        ({"pattern": "AF AF", "at": {"A#1": {"window": 4}}}, "llama cannot hold A#1.window: 4, it would be None"),
        ({"pattern": "AF AF", "at": {"F#1": {"hidden": 64}}}, "llama cannot hold F#1.hidden: 64, it would be 192"),
        ({"pattern": "AF A"}, "llama cannot hold"),
        ({"pattern": "[A|F]F"}, "llama cannot hold par#0"),
        ({"pattern": "AF", "norm": {"kind": "layer_norm"}}, "llama cannot hold"),
        ({"pattern": "FF"}, "llama cannot hold 'FF': it has no layer of kind attention"),
    ],
)
def test_what_a_family_cannot_hold_is_named_and_nothing_written(
    tmp_path: Path, design: dict[str, Any], message: str
) -> None:
    model = plait.build({"vocab": 61, "dim": 64, **design})
    with pytest.raises(ValueError, match=message):
        plait.export(model, tmp_path / "out", "llama")
    assert not (tmp_path / "out").exists()


def test_a_model_of_ours_is_one_of_theirs(tmp_path: Path) -> None:
    model = plait.build(
        {"vocab": 61, "dim": 64, "pattern": "(AF)2", "layers": {"A": {"kind": "attention", "kv_heads": 1}}}
    )
    with pytest.raises(ValueError, match="this model came from no family; say which"):
        plait.export(model, tmp_path / "out")
    plait.export(model, tmp_path / "out", "llama")
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(theirs(TOKENS).logits, model(TOKENS)[0], atol=1e-5)  # float32, two layers
