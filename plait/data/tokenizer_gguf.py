"""The tokenizer inside a GGUF file, as the files that transformers keeps one in."""

import json
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from plait.data.errors import DataError, first_line
from plait.data.gguf_file import GGUF

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


LLAMA3 = _split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = _split(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is cut before bytes are merged, by tokenizer.ggml.pre.
CUTS = {
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "jais"), GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), LLAMA3),
    "tekken": TEKKEN,
}
WHOLE_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a word that is a token is not merged from its bytes
BEGUN = ("llama-bpe", "llama3", "llama-v3", "tekken")  # texts that begin with bos where the file does not say


def tokenizer_files(file: GGUF) -> dict[str, str]:
    """tokenizer.json, tokenizer_config.json, generation_config.json and, where there is one, chat_template.jinja. Raises
    DataError naming the field that is missing or that plait does not know."""
    tokens: list[str] = _ggml(file, "tokens")
    named = {role: tokens[id] for role, id in _ids(file).items() if id < len(tokens)}
    if "eos_token" not in named:
        raise DataError(f"{file.path}: tokenizer.ggml.eos_token_id is missing, or no token has it")
    adds = {name: _adds(file, name) for name in ("bos", "eos")}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        **{f"add_{name}_token": value for name, value in adds.items()},
        "clean_up_tokenization_spaces": False,
        **({"model_max_length": length} if (length := file.fields.get("llama.context_length")) else {}),
    }
    files = {
        "tokenizer.json": _tokenizer(file, tokens, named, adds).to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        "generation_config.json": json.dumps(_generation(file), indent=2) + "\n",
    }
    template = file.fields.get("tokenizer.chat_template")
    return files | ({"chat_template.jinja": template} if template else {})


def _ggml(file: GGUF, name: str) -> Any:
    return file.field(f"tokenizer.ggml.{name}")


def _ids(file: GGUF) -> dict[str, int]:
    named = {role: file.fields.get(f"tokenizer.ggml.{name}_token_id") for role, name in ROLES.items()}
    return {role: id for role, id in named.items() if id is not None}


def _generation(file: GGUF) -> dict[str, Any]:
    """A chat's turn may end with another token than a text does."""
    ids = _ids(file)
    ends = [id for id in (ids["eos_token"], file.fields.get("tokenizer.ggml.eot_token_id")) if id is not None]
    said = {"bos_token_id": ids.get("bos_token"), "eos_token_id": ends[0] if len(set(ends)) == 1 else ends}
    return {name: id for name, id in (said | {"pad_token_id": ids.get("pad_token")}).items() if id is not None}


def _adds(file: GGUF, name: str) -> bool:
    """Whether texts begin with bos, end with eos."""
    said = file.fields.get(f"tokenizer.ggml.add_{name}_token")
    usual = _ggml(file, "model") == "llama" or file.fields.get("tokenizer.ggml.pre") in BEGUN
    return name == "bos" and usual if said is None else said


def _tokenizer(file: GGUF, tokens: list[str], named: dict[str, str], adds: dict[str, bool]) -> tokenizers.Tokenizer:
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = _ggml(file, "model")
    if kind not in kinds:
        raise DataError(f"{file.path}: tokenizer.ggml.model is {kind!r}; plait reads {' and '.join(kinds)}")
    types = file.fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(types) != len(tokens) or len(vocab) != len(tokens):
        raise DataError(
            f"{file.path}: tokenizer.ggml.tokens has {len(vocab):,} tokens that differ, {len(types):,} types"
        )
    try:
        inner = kinds[kind](file, vocab, types)
    except DataError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{file.path}: no tokenizer can be made of it ({first_line(error)})") from None
    marked = [token for token, type in zip(tokens, types, strict=True) if type == CONTROL]
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in marked])
    defined = [token for token, type in zip(tokens, types, strict=True) if type == USER_DEFINED]
    inner.add_tokens([AddedToken(token, special=False, normalized=False) for token in defined])
    before = [named["bos_token"]] if adds["bos"] and "bos_token" in named else []
    after = [named["eos_token"]] if adds["eos"] else []
    if before or after:
        once = [*before, "$A", *after]
        inner.post_processor = processors.TemplateProcessing(
            single=once,
            pair=[f"{part}:{index}" for index, name in enumerate("AB") for part in (*before, f"${name}", *after)],
            special_tokens=[(token, vocab[token]) for token in dict.fromkeys([*before, *after])],
        )
    return inner


def _byte_level(file: GGUF, vocab: dict[str, int], types: list[int]) -> tokenizers.Tokenizer:
    """GPT-2's kind: bytes, written as the printable characters of its table, merged in the order of the file's list."""
    cut = _ggml(file, "pre")
    if cut not in CUTS:
        raise DataError(f"{file.path}: tokenizer.ggml.pre is {cut!r}; plait reads {', '.join(CUTS)}")
    merges = [tuple(merge.split(" ")) for merge in _ggml(file, "merges")]
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut in WHOLE_FIRST))
    inner.pre_tokenizer, inner.decoder = CUTS[cut], decoders.ByteLevel()
    return inner


def _sentencepiece(file: GGUF, vocab: dict[str, int], types: list[int]) -> tokenizers.Tokenizer:
    """SentencePiece's kind: characters, with spaces as U+2581, merged into the piece of the highest score."""
    scores = _ggml(file, "scores")
    ordinary = {token: id for token, id in vocab.items() if types[id] in (NORMAL, USER_DEFINED)}
    merges = sorted(_pairs(ordinary), key=lambda pair: (-scores[vocab["".join(pair)]], vocab[pair[0]], vocab[pair[1]]))
    unknown = next((token for token, id in vocab.items() if types[id] == UNKNOWN), None)
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    space = file.fields.get("tokenizer.ggml.add_space_prefix", True)
    before = [normalizers.Prepend("\u2581")] if space else []
    inner.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", left=1)] if space else []
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return inner


def _pairs(pieces: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Every two pieces that make a third."""
    for piece in pieces:
        for cut in range(1, len(piece)):
            if piece[:cut] in pieces and piece[cut:] in pieces:
                yield piece[:cut], piece[cut:]
