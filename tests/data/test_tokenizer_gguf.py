"""Tokenizers inside GGUF files: the ids of the tokenizer that the file was made of."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

import plait
from plait.data import DataError
from plait.data.gguf_file import open_gguf
from plait.data.tokenizer_gguf import tokenizer_files

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = (
    "The year 1984, and 42 more: don't they'll I'm  two  spaces\n\n\tTabs\r\n ünïcode Ωμέγα 中文字符 한국어 🙂👩‍👩‍👧 "
    "½²³ ١٢٣ עברית <|im_start|>user\nhello<|im_end|>"
)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CHAT = [{"role": "user", "content": "How many is 12 ½?"}, {"role": "assistant", "content": "Twelve."}]
DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
CUTS = {"gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False), "smollm": DIGITS}


def trained(cut: str) -> tokenizers.Tokenizer:
    """A byte-level BPE that learnt from TEXT."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = CUTS[cut], decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([TEXT.replace("<|", "< |")] * 4, trainer)
    return inner


def byte_level(inner: tokenizers.Tokenizer, cut: str, **more: Any) -> dict[str, Any]:
    """Its header."""
    model = json.loads(inner.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": cut,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


@pytest.mark.parametrize("cut", CUTS)
def test_ids_are_those_of_the_tokenizer_that_the_file_was_made_of(cut: str, gguf_file: Callable[..., Path]) -> None:
    inner = trained(cut)
    found = plait.load_tokenizer(gguf_file(byte_level(inner, cut), {}))
    assert found.encode(TEXT, special=True) == inner.encode(TEXT).ids
    assert found.decode(found.encode(TEXT)) == TEXT
    assert (found.eos, found.vocab) == (2, inner.get_vocab_size())


def test_transformers_reads_what_is_saved(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    inner = trained("smollm")
    found = plait.load_tokenizer(gguf_file(byte_level(inner, "smollm"), {}))
    found.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs(TEXT).input_ids == found.encode(TEXT, special=True)
    chat = theirs.apply_chat_template(CHAT, tokenize=False)
    assert chat.startswith("<|im_start|>user\nHow many")
    assert theirs.apply_chat_template(CHAT, return_dict=False) == inner.encode(chat).ids
    assert plait.load_tokenizer(tmp_path / "saved").hash == found.hash


def test_a_text_begins_and_ends_as_the_file_says(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    said = {"add_bos_token": True, "add_eos_token": True, "eot_token_id": 0}
    files = tokenizer_files(open_gguf(gguf_file(byte_level(trained("gpt-2"), "gpt-2", **said), {})))
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs("one").input_ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert theirs("one", "two").input_ids == ids + theirs("two").input_ids
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [2, 0]


PIECES = {
    "\u2581the": -1.0,
    "th": -2.0,
    "he": -3.0,
    "\u2581t": -4.0,
    "the": -5.0,
    "e\u2581": -9.0,
    "\u2581\u2581": -6.0,
}


def sentencepiece(**more: Any) -> dict[str, Any]:
    """A header of SentencePiece's kind: pieces with scores, single characters, and bytes for what is none of them."""
    letters = {letter: -10.0 - i for i, letter in enumerate("\u2581theo nü")}
    named = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, *letters]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(PIECES) + len(letters))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": named,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [0.0] * 259 + [*PIECES.values(), *letters.values()],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


def merged(text: str) -> list[str]:
    """SentencePiece's definition: of all pieces side by side, the two first become one that make the best known piece."""
    pieces = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        known = {i: PIECES[a + b] for i, (a, b) in enumerate(pairwise(pieces)) if a + b in PIECES}
        if not known:
            return pieces
        at = min(known, key=lambda i: (-known[i], i))
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


@pytest.mark.parametrize("text", ["the other then", "  the thee", "o the  ", "hethe he"])
def test_pieces_are_merged_as_sentencepiece_does(text: str, gguf_file: Callable[..., Path]) -> None:
    header = sentencepiece()
    found = plait.load_tokenizer(gguf_file(header, {}))
    tokens = header["tokenizer.ggml.tokens"]
    assert [tokens[id] for id in found.encode(text)] == [
        token if token in tokens else f"<0x{ord(token):02X}>" for token in merged(text)
    ]
    assert found.decode(found.encode(text)) == text


def test_what_no_piece_has_is_written_in_bytes(gguf_file: Callable[..., Path]) -> None:
    found = plait.load_tokenizer(gguf_file(sentencepiece(), {}))
    assert found.decode(found.encode("thé 中🙂 the")) == "thé 中🙂 the"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "kanji"}, r"tokenizer\.ggml\.pre is 'kanji'; plait reads gpt-2"),
        ({"tokenizer.ggml.pre": None}, r"tokenizer\.ggml\.pre is missing"),
        ({"tokenizer.ggml.model": "bert"}, r"tokenizer\.ggml\.model is 'bert'; plait reads gpt2 and llama"),
        ({"tokenizer.ggml.tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
        ({"tokenizer.ggml.merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"tokenizer.ggml.merges": ["q zz"]}, "no tokenizer can be made of it"),
        ({"tokenizer.ggml.token_type": [1]}, "340 tokens that differ, 1 types"),
        ({"tokenizer.ggml.eos_token_id": None}, r"eos_token_id is missing"),
    ],
)
def test_wrong_headers(changes: dict[str, Any], message: str, gguf_file: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=message) as caught:
        plait.load_tokenizer(gguf_file(byte_level(trained("gpt-2"), "gpt-2") | changes, {}))
    assert "\n" not in str(caught.value)
