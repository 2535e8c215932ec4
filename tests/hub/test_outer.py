"""Folders that hold more than a text model, or hold it under other names."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from plait.hub.checkpoint import export, read
from plait.hub.families import OUTER, family
from plait.hub.parity import TOLERANCE, pair

VISION = {
    "depth": 1,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_heads": 2,
    "out_hidden_size": 16,
    "num_position_embeddings": 16,
}
SIGLIP = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
CLASSES = {
    "gemma3": transformers.Gemma3ForConditionalGeneration,
    "qwen3_5": transformers.Qwen3_5ForConditionalGeneration,
    "qwen3_5_moe": transformers.Qwen3_5MoeForConditionalGeneration,
}


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", OUTER)
def test_the_text_model_of_several_parts(name: str, tied: bool, tmp_path: Path) -> None:
    """Read out of a folder with image weights and layers that guess ahead, and written as a text model of its own."""
    text = family(OUTER[name]).tiny(Random(5)) | {"tie_word_embeddings": tied}
    if name == "gemma3":
        text["final_logit_softcapping"] = (
            None  # transformers' class of several parts leaves it out; no published config has it
        )
    vision = SIGLIP | {"patch_size": 14} if name == "gemma3" else VISION | {"out_hidden_size": text["hidden_size"]}
    parts: dict[str, Any] = {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied}
    config = CONFIG_MAPPING[name](**parts)
    torch.manual_seed(0)
    theirs = CLASSES[name](config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    ahead = {} if name == "gemma3" else {"mtp.fc.weight": torch.zeros(3, 3)}
    save_file(tensors | ahead, tmp_path / "model.safetensors", {"format": "pt"})
    tokens = torch.randint(97, (1, 21))
    expected = theirs(input_ids=tokens, use_cache=False).logits
    ours = read(tmp_path)
    assert (ours(tokens)[0] - expected).abs().max() <= TOLERANCE * expected.abs().max()

    export(ours, tmp_path / "text")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert type(again).__name__ == family(OUTER[name]).architecture
    alone = again(input_ids=tokens, use_cache=False).logits
    assert (alone - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    pair("qwen3_5_text", 0, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"norm\.weight"):
        read(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe_text"])
def test_experts_beside_each_other_or_one_by_one(name: str, tmp_path: Path) -> None:
    """Both are read, and written as they were read."""
    models = pair(name, 1, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stacks = [key for key in tensors if key.endswith(".experts.0.down_proj.weight")]
    assert stacks
    for key in stacks:
        inside = key.removesuffix("0.down_proj.weight")
        count = sum(key.startswith(inside) and key.endswith("down_proj.weight") for key in tensors)
        gate, up, down = (
            torch.stack([tensors.pop(f"{inside}{i}.{part}_proj.weight") for i in range(count)])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{inside}gate_up_proj": torch.cat([gate, up], 1), f"{inside}down_proj": down}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    again = read(tmp_path)
    assert torch.equal(again(models.tokens[None])[0], models.ours(models.tokens[None])[0])
    export(again, tmp_path / "returned")
    assert load_file(tmp_path / "returned" / "model.safetensors").keys() == tensors.keys()
