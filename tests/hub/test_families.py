"""Every family of transformers that plait reads: the same numbers on every path, and the way back."""

from random import Random
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

import plait
from plait.hub.checkpoint import config_of, design_of, export
from plait.hub.families import NAMES, TRANSFORMERS, family
from plait.hub.families.llama import FULL, SLIDING
from plait.hub.parity import LAWS, pair, parity

WHOLE = {"rope_type": "default", "rope_theta": 1e4}
HALF = WHOLE | {"partial_rotary_factor": 0.5}  # which most of transformers' classes do not heed
UNCUT = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "truncate": False,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_parity(name: str, seed: int) -> None:
    results = list(parity([name], [seed]))
    assert {result.law for result in results} == LAWS.keys()
    assert not [(result.law, result.message) for result in results if result.message]


@pytest.mark.parametrize("name", NAMES)
def test_a_family_names_itself(name: str) -> None:
    assert family(name).model_type == name


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'qwen2'"):
        family("qwen22")


def config(name: str, **changes: object) -> dict[str, object]:
    """A small one of the family, of transformers' own."""
    return CONFIG_MAPPING[name](**family(name).tiny(Random(0)) | changes).to_dict()


def test_rotary_dim_of_minimax_is_how_much_of_a_head_turns() -> None:
    """In transformers' class all of it turns, whatever the published config says."""
    found = family("minimax")
    design = design_of(found, config("minimax", head_dim=16, rotary_dim=8), "here")
    assert plait.Attention(rope={"theta": 1e6, "fraction": 0.5}).rope == design.layers["A"].rope
    assert config_of(found, design, {}).rotary_dim == 8


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "lfm2",
            {"layer_types": ["conv", "sliding_attention"], "num_hidden_layers": 2},
            "layer_types has 'sliding_attention'",
        ),
        ("recurrent_gemma", {"hidden_activation": "silu"}, "hidden_activation 'silu' is not supported"),
        ("xlstm", {"weight_mode": "fused"}, "weight_mode 'fused' is not supported"),
        ("falcon_h1", {"attention_bias": True, "attention_in_multiplier": 0.5}, "attention_in_multiplier 0.5 beside"),
        ("minimax", {"newer": 1}, "plait does not know 'newer'"),
        (
            "llama",
            {"rope_parameters": HALF},
            "rope_parameters: partial_rotary_factor 0.5 is not supported; plait reads 1",
        ),
        ("deepseek_v3", {"rope_parameters": HALF}, "partial_rotary_factor 0.5 is not supported"),
        ("deepseek_v3", {"head_dim": 2, "qk_rope_head_dim": 4}, "head_dim 2 is not supported; plait reads 4"),
        ("recurrent_gemma", {"hidden_size": 18, "num_attention_heads": 3, "num_key_value_heads": 1}, "of 6 channels"),
        ("gemma3_text", {"rope_parameters": {FULL: UNCUT, SLIDING: WHOLE}}, "rope_parameters: truncate False is not"),
        ("olmo3", {"rope_parameters": {FULL: UNCUT, SLIDING: WHOLE}}, "rope_parameters: truncate False is not"),
        ("granite", {"logits_scaling": 0}, r"^here: no model can be made of logits_scaling 0 \(division by zero\)$"),
        ("deepseek_v3", {"first_k_dense_replace": None}, "^here: no model can be made of first_k_dense_replace null"),
    ],
)
def test_what_a_family_does_not_read_is_named(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        design_of(family(name), config(name, **changes), "here")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "qwen3",
            {"layer_types": ["chunked_attention"] * 2},
            "layer_types has 'chunked_attention', which is not supported",
        ),
        (
            "qwen2",
            {"layer_types": [SLIDING, FULL], "use_sliding_window": False},
            "sliding_window must be above 0 .* got None",
        ),
        (
            "qwen2_moe",
            {"layer_types": [SLIDING, FULL], "use_sliding_window": False},
            "sliding_window must be above 0 .* got 0",
        ),
        ("smollm3", {"layer_types": [SLIDING, FULL], "sliding_window": 4}, "layer_types has 'sliding_attention'"),
        (
            "zamba2",
            {"layers_block_type": ["hybrid", "linear_attention"], "hybrid_layer_ids": [1]},
            r"hybrid_layer_ids \[1\]",
        ),
    ],
)
def test_types_of_blocks_that_other_fields_contradict(name: str, changes: dict[str, Any], message: str) -> None:
    """Theirs may compute something all the same; what, another field would have to say."""
    with pytest.raises(ValueError, match=message):
        design_of(family(name), config(name, num_hidden_layers=2, **changes), "here")


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("dense", [{"num_experts": 0}, {"mlp_only_layers": [0, 1]}])
def test_a_family_of_experts_without_a_block_of_them(name: str, dense: dict[str, Any]) -> None:
    given = config(name, num_hidden_layers=2, **dense)
    assert design_of(family(name), given, "here").pattern == "(AF)2"


def test_a_changed_design_does_not_keep_what_followed_from_the_old_one() -> None:
    old, new = (
        config("zamba2", num_hidden_layers=2, layers_block_type=[*kinds, "hybrid"])
        for kinds in (["hybrid"], ["linear_attention"])
    )
    found = family("zamba2")
    assert config_of(found, design_of(found, new, "here"), old).hybrid_layer_ids == [1]


def test_a_design_that_was_not_changed_has_the_config_it_came_with() -> None:
    given = config("lfm2", block_auto_adjust_ff_dim=True, block_multiple_of=8)
    found = family("lfm2")
    assert config_of(found, design_of(found, given, "here"), given).to_dict() == given


def test_norms_that_are_one_in_theirs_must_be_equal(tmp_path) -> None:
    """Zamba2's shared block has its norms once; here each use has its own."""
    model = pair("zamba2", 0, tmp_path).ours
    design = model.design
    last = [i for i, slot in enumerate(design.slots) if slot.letter == design.slots[1].letter][-1]
    with torch.no_grad():
        model.get_parameter(f"slots.{last}.norm.weight").add_(1)
    with pytest.raises(ValueError, match="zamba2 cannot hold this model: .* are one tensor there, and differ here"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
