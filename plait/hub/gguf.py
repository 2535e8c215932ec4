"""GGUF files of llama.cpp, opened as models: their header as a config of transformers, their tensors under its names."""

import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from plait.data.gguf_file import GGUF, open_gguf
from plait.data.tokenizer_gguf import tokenizer_files
from plait.design.layers import RoPE
from plait.design.layers.rope import Llama3
from plait.design.model import ModelConfig
from plait.hub.checkpoint import design_of, fill_model
from plait.hub.families import Family, family
from plait.hub.families.fields import Fields
from plait.layers.rope import frequencies
from plait.model.build import empty_model
from plait.model.language_model import LanguageModel
from plait.model.weight_files import expect

ARCHITECTURES = ("llama",)
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FREQUENCIES = "rope_freqs.weight"
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL = 1.0, 4.0, 8192  # of every Llama 3.1 to 3.3


def read_gguf(path: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
    """A model of a GGUF file, with its tokenizer, every weight as the number that it is quantised to.

    In float32 unless `dtype` says otherwise: bfloat16 has fewer digits than a quantised weight, which is a scale times an
    integer. Raises ValueError naming the field or the tensor that plait cannot read, is missing or is left over.
    """
    file = open_gguf(path)
    found, raw = _config(file)
    design = design_of(found, raw, str(path))
    carried = {name: text.encode() for name, text in tokenizer_files(file).items()}
    model = empty_model(design, device=device)
    kept = fill_model(model, found, Dequantised(file, raw, dtype or torch.float32), torch.device(device))
    model.origin = {"family": found.model_type, "config": raw, **kept}
    model.tokenizer_files = carried
    return model


def design_of_gguf(path: Path) -> ModelConfig:
    """The design alone, of the header."""
    found, raw = _config(open_gguf(path))
    return design_of(found, raw, str(path))


def _config(file: GGUF) -> tuple[Family, dict[str, Any]]:
    """The header in the words of transformers' config. Every field about the model has been read, or is an error."""
    architecture = file.field("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: architecture {architecture!r}; plait reads GGUF files of {', '.join(ARCHITECTURES)}"
        )
    if file.fields.get("split.count", 1) > 1:
        parts = file.fields["split.count"]
        raise ValueError(f"{file.path}: one of {parts} parts; join them first: llama-gguf-split --merge FIRST NEW")
    found = family(architecture)
    return found, {"model_type": found.model_type, "architectures": [found.architecture], **_llama(file)}


def _llama(file: GGUF) -> dict[str, Any]:
    given = {name: _one(file, name, value) for name, value in file.fields.items() if name.startswith("llama.")}
    f = Fields(given, str(file.path))
    f.must(**{"llama.tensor_data_layout": "Meta AI original pth", "llama.attention.causal": True})
    dim, heads = f["llama.embedding_length"], f["llama.attention.head_count"]
    head_dim = f.get("llama.attention.key_length", dim // heads)
    f.must(
        **{"llama.attention.value_length": head_dim, "llama.rope.dimension_count": head_dim, "llama.expert_count": 0}
    )
    f.must(**{"llama.expert_used_count": 0})
    config = {
        "vocab_size": f.get("llama.vocab_size") or len(file.field("tokenizer.ggml.tokens")),
        "hidden_size": dim,
        "intermediate_size": f["llama.feed_forward_length"],
        "num_hidden_layers": f["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": f.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": f["llama.context_length"],
        "rms_norm_eps": f["llama.attention.layer_norm_rms_epsilon"],
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "rope_parameters": _rope(f, file, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    f.check()
    ids = {name: file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")}
    return config | {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["padding"]}


def _one(file: GGUF, name: str, value: Any) -> Any:
    """A header may say a number for each layer."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise ValueError(
            f"{file.path}: {name} is not the same in all layers, which a Llama of transformers cannot hold"
        )
    return value[0]


def _rope(f: Fields, file: GGUF, head_dim: int) -> dict[str, Any]:
    theta = f.get("llama.rope.freq_base", 10_000.0)
    f.must(**{"llama.rope.scaling.type": ("linear", "none")})
    f.carried("llama.rope.scaling.original_context_length", "llama.rope.scaling.finetuned")
    factor = f.get("llama.rope.scaling.factor") or f.get("llama.rope.scale_linear") or 1.0  # the second in older files
    linear = 1.0 if f.get("llama.rope.scaling.type") == "none" else factor
    kind = {"rope_type": "default"} if linear == 1 else {"rope_type": "linear", "factor": linear}
    if FREQUENCIES in file.tensors:
        if linear != 1:
            raise ValueError(f"{file.path}: {FREQUENCIES} beside a linear scaling of RoPE, which plait does not know")
        kind = _llama3(file, theta, head_dim)
    return {"rope_theta": theta, **kind}


def _llama3(file: GGUF, theta: float, head_dim: int) -> dict[str, Any]:
    """Such files hold by how much each pair of a head turns more slowly, and not the rule of which that came."""
    slower = torch.from_numpy(dequantised(file, FREQUENCIES))
    factor = float(slower.max())
    scaling = Llama3(factor=factor, low=LLAMA3_LOW, high=LLAMA3_HIGH, original=LLAMA3_ORIGINAL)
    plain, scaled = (
        frequencies(RoPE(theta=theta, scaling=rule), head_dim, slower.device, torch.float32)[0]
        for rule in (None, scaling)
    )
    if slower.shape != plain.shape or not torch.allclose(plain / scaled, slower, rtol=1e-4):
        raise ValueError(
            f"{file.path}: {FREQUENCIES} is not how Llama 3.1 scales RoPE, the one way that plait knows in GGUF"
        )
    limits = {"low_freq_factor": LLAMA3_LOW, "high_freq_factor": LLAMA3_HIGH}
    return {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": LLAMA3_ORIGINAL, **limits}


class Dequantised:
    """A file's tensors under transformers' names, each dequantised when it is read: a `WeightSource`."""

    def __init__(self, file: GGUF, config: Mapping[str, Any], dtype: torch.dtype):
        self.file, self.dtype = file, dtype
        self.names = {_named(name): name for name in file.tensors if name != FREQUENCIES}
        self.where = dict.fromkeys(self.names, file.path)
        self.heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    def expect(self, expected: set[str]) -> None:
        expect(self.file.path, self.where.keys(), expected)

    def path_of(self, name: str) -> Path:
        return self.file.path

    def sizes(self) -> dict[str, int]:
        return {name: prod(self.file.tensors[stored].shape) for name, stored in self.names.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Raises ValueError for a quantisation that cannot be read, before any is."""
        for name in self.names.values():
            _kind(self.file, name)
        return dict.fromkeys(self.names, self.dtype)

    def tensor(self, name: str) -> Tensor:
        stored = self.names[name]
        numbers = torch.from_numpy(dequantised(self.file, stored))
        heads = next((heads for part, heads in self.heads.items() if f".{part}." in stored), None)
        return (numbers if heads is None else _halves(numbers, heads)).to(self.dtype)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            yield name, self.tensor(name)


def _named(name: str) -> str:
    """A tensor's name in transformers; its own where it has none, so that it is found to be left over."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block and block[2] in BLOCK:
        return f"model.layers.{block[1]}.{BLOCK[block[2]]}.{block[3]}"
    module, _, leaf = name.rpartition(".")
    return f"{ENDS[module]}.{leaf}" if module in ENDS else name


def _halves(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp turns a head's rows 2i and 2i + 1 together, transformers and plait rows i and i + half."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def dequantised(file: GGUF, name: str) -> np.ndarray:
    """A tensor's numbers, in float32. Raises ValueError where they cannot be read."""
    stored = file.tensors[name]
    kind = _kind(file, name)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if not stored.shape or stored.shape[-1] % block:
        raise ValueError(
            f"{file.path}: {name} has shape {stored.shape}, whose rows are not of {kind.name}'s blocks of {block}"
        )
    shape = (*stored.shape[:-1], stored.shape[-1] // block * size)
    if len(file.data) < stored.offset + prod(shape):
        raise ValueError(f"{file.path}: cut short in {name}, {len(file.data):,} bytes")
    content = np.frombuffer(file.data, np.uint8, prod(shape), stored.offset).reshape(shape)
    numbers = gguf.dequantize(content, kind)
    return numbers if numbers.flags.owndata and numbers.flags.writeable else np.array(numbers)


def _kind(file: GGUF, name: str) -> gguf.GGMLQuantizationType:
    number = file.tensors[name].type
    try:
        kind = gguf.GGMLQuantizationType(number)
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        said = next((kind.name for kind in gguf.GGMLQuantizationType if kind == number), f"number {number}")
        raise ValueError(f"{file.path}: {name} is of type {said}, which the package gguf cannot dequantise") from None
    return kind
