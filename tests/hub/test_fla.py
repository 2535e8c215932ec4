"""Folders of flash-linear-attention, beside logits that its own models gave (benchmarks/fla_logits.py), and the way back."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import plait
from plait.hub.checkpoint import config_of, design_of, export, read
from plait.hub.families import FLA, family
from plait.hub.parity import TOLERANCE, formula

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "fla.json").read_text())
SHARED = "model.lower_bounds"  # of HGRN-2's layers; its bounds go back, not its bits
IDS = [f"{case['family']}-{i}" for i, case in enumerate(CASES)]


def written(case: dict[str, Any], folder: Path) -> Path:
    """The folder that the case's logits are of."""
    tensors = {name: formula(name, shape) for name, shape in case["shapes"].items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(case["config"] | {"model_type": case["family"]}))
    return folder


def test_every_family_has_cases() -> None:
    assert {case["family"] for case in CASES} == set(FLA)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_logits_are_theirs(case: dict[str, Any], tmp_path: Path) -> None:
    model, tokens = read(written(case, tmp_path)), torch.tensor([case["tokens"]])
    expected = torch.tensor(case["logits"])
    count = len(expected)
    for found in (model(tokens)[0][0, -count:], stepped(model, tokens, count)):
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def stepped(model: plait.LanguageModel, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Of the last so many tokens, one by one."""
    _, state = model(tokens[:, :-count], model.init_state(batch=1))
    found = []
    for token in tokens[0, -count:]:
        logits, state = model(token[None, None], state)
        found.append(logits[0, 0])
    return torch.stack(found)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_way_back(case: dict[str, Any], tmp_path: Path) -> None:
    model = read(written(case, tmp_path))
    export(model, tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "back"))
    assert before.keys() == after.keys()
    if SHARED in before:  # tests/hub/test_fla_hgrn2.py holds it
        assert before.pop(SHARED).shape == after.pop(SHARED).shape
    assert before and all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: config[name] for name in case["config"]} == case["config"]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", FLA)
def test_a_config_of_ones_own_says_it_all(name: str, seed: int) -> None:
    found = family(name)
    design = design_of(found, found.tiny(Random(seed)), "drawn")
    config = config_of(found, design, {})
    assert design_of(found, config.to_dict(), "again").hash == design.hash


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gla", "clamp_min", -1.0),
        ("gla", "feature_map", "relu"),
        ("retnet", "num_kv_heads", 1),
        ("delta_net", "qk_norm", "sum"),
        ("gated_deltanet", "use_gate", False),
        ("gated_deltanet", "attn", {"layers": [0], "num_heads": 2}),
        ("hgrn2", "use_short_conv", True),
        ("hgrn2", "elementwise_affine", False),
        ("hgrn2", "expand_ratio", 7),
        ("hgrn2", "attn", {"layers": [0], "num_heads": 2}),
        ("rwkv7", "value_dim", 128),
        ("rwkv7", "something_new", 1),
    ],
)
def test_what_plait_does_not_compute_is_named(name: str, field: str, value: Any) -> None:
    found = family(name)
    with pytest.raises(ValueError, match=field):
        design_of(found, found.tiny(Random(0)) | {field: value}, "config.json")
