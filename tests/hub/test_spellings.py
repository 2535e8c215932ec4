"""Configs as they are published, with older spellings and what their first code left in them: each opens at its known size.

They are as remembered, not downloaded: the spelling of their fields is what is tested."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plait.design.count import parameters
from plait.hub.checkpoint import config_of, folder_design
from plait.hub.families import family
from plait.hub.families.left_over import left_over

CONFIGS: dict[str, Any] = json.loads((Path(__file__).parent / "spellings.json").read_text(encoding="utf-8"))
BILLIONS = {
    "SmolLM2-135M": 0.1345, "SmolLM3-3B": 3.075, "Llama-3.2-1B": 1.236, "TinyLlama": 1.100, "Mistral-7B-v0.1": 7.242,
    "Qwen2.5-0.5B": 0.494, "Qwen3-0.6B": 0.596, "Qwen3-30B-A3B": 30.53, "Qwen3-Next-80B-A3B": 79.7, "gemma-2-2b": 2.614,
    "gemma-3-1b": 1.0, "gemma-3-270m": 0.268, "OLMo-2-1B": 1.485, "Phi-3-mini-4k": 3.821, "Phi-4-mini": 3.836,
    "mamba-130m-hf": 0.129, "Codestral-mamba": 7.285, "Falcon-H1-0.5B": 0.521, "Jamba-v0.1": 51.57, "Zamba2-1.2B": 1.215,
    "Bamba-9B": 9.78, "Nemotron-H-8B": 8.1, "Nemotron-3-Nano-30B-A3B": 31.6, "granite-4.0-h-350m": 0.340, "LFM2-350M": 0.354,
    "recurrentgemma-2b": 2.683, "xLSTM-7b": 6.865, "DeepSeek-V2-Lite": 15.71, "DeepSeek-V3": 671.0,
    "Qwen3.5-0.8B text": 0.752, "Kimi-Linear-48B-A3B": 49.1, "gemma-3-4b": 3.88, "Ministral-8B": 8.02, "Qwen3-8B-yarn": 8.191,
    "Qwen2-57B-A14B": 57.41, "Mixtral-8x7B": 46.70, "gemma-3-27b": 27.01, "Qwen3.5-9B": 8.95, "Olmo-3-7B": 7.298,
    "Olmo-Hybrid-7B": 7.43, "Phi-3.5-mini": 3.821, "Jamba-Reasoning-3B": 3.03, "Nemotron-Nano-9B-v2": 8.89,
    "granite-4.0-micro": 3.40, "LFM2-1.2B": 1.17, "MiniMax-Text-01-hf": 456.0, "DeepSeek-V2": 235.7,
    "RWKV7-Goose-World2.9-0.4B": 0.451, "fla-gla-1.3B": 1.37, "fla-delta_net-1.3B": 1.37,
}  # fmt: skip


def opened(name: str, folder: Path, **more: Any) -> Any:
    config = CONFIGS[name]
    config = config | ({"text_config": config["text_config"] | more} if "text_config" in config else more)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder_design(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_opens(name: str, tmp_path: Path) -> None:
    design = opened(name, tmp_path)
    assert parameters(design) == pytest.approx(BILLIONS[name] * 1e9, rel=0.012)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("LFM2-1.2B", "theta", 10_000.0),
        ("Olmo-Hybrid-7B", "linear_use_gate", False),
        ("fla-delta_net-1.3B", "norm_first", True),
        ("fla-delta_net-1.3B", "share_conv_kernel", True),
    ],
)
def test_an_older_field_that_says_something_else_is_refused(name: str, field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{field} {value} is not supported"):
        opened(name, tmp_path, **{field: value})


@pytest.mark.parametrize("name", ["Qwen3-8B-yarn", "Phi-3.5-mini", "Kimi-Linear-48B-A3B"])
def test_advice_to_its_own_users_is_not_passed_on(name: str, tmp_path: Path) -> None:
    """Neither by its logger nor by a warning."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
    code = (
        f"from plait.hub.checkpoint import folder_design; folder_design(__import__('pathlib').Path({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["SmolLM2-135M", "LFM2-350M", "xLSTM-7b"])
def test_what_is_left_over_goes_back(name: str, tmp_path: Path) -> None:
    """It is no part of the config that computes, and is written beside it again."""
    raw = CONFIGS[name]
    again = config_of(family(raw["model_type"]), opened(name, tmp_path), raw).to_dict()
    rest = left_over(raw["model_type"], raw)
    assert rest
    assert not {key for key in rest if key in again and not key.endswith("_kernel")}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_field_that_nobody_knows_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plait does not know 'newer_field'"):
        opened(name, tmp_path, newer_field=3)
