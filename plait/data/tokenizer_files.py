"""Tokenizers found by name or path."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from plait.data.cache import cached
from plait.data.chat_template import TEMPLATE
from plait.data.corpus import Source, open_source, texts
from plait.data.errors import DataError, NotFound, first_line, nearest
from plait.data.gguf_file import gguf_path, open_gguf
from plait.data.tokenizer import END_OF_TEXT, ByteTokenizer, Tokenizer
from plait.data.tokenizer_hf import ENDS, HuggingFaceTokenizer, PythonTokenizer, bpe_size, train_bpe
from plait.files import read_text, user_path

# Files saved with a tokenizer.json that say what it means in a chat, and where an answer ends; kept as they are.
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", TEMPLATE, ENDS)
# One of these makes a folder a tokenizer's where there is no tokenizer.json.
OLDER_FILES = ("tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """`bytes`, the Hugging Face tokenizer in a folder or a tokenizer.json (a plait run's folder holds one too), or that of a
    GGUF file: by its path, or by the name of a model that an installed package ships ("smollm2").

    Nothing is fetched. Raises NotFound or DataError, in one line.
    """
    if str(spec) == "bytes":
        return ByteTokenizer()
    if (file := gguf_path(spec)) is not None:
        return _from_gguf(file)
    path = user_path(spec)
    if not path.exists():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        hint = nearest(str(spec), ["bytes", *map(str, beside)])
        raise NotFound(f"tokenizer {str(spec)!r}: no such file or folder; expected bytes or a tokenizer's folder{hint}")
    if path.is_file():
        return _from_json(path)
    for folder in (path, path / "tokenizer"):
        if (folder / "tokenizer.json").is_file():
            return _from_json(folder / "tokenizer.json")
        if any((folder / name).is_file() for name in OLDER_FILES):
            return _from_transformers(folder)
    raise NotFound(f"tokenizer {str(spec)!r}: no tokenizer in this folder; expected a tokenizer.json")


def cached_bpe(source: str | Path | Source, vocab: int, folder: str | Path) -> Tokenizer:
    """`train_bpe` on a source, made now unless it is under `folder` already."""
    vocab = bpe_size(vocab)
    cache = user_path(folder)
    opened = source if not isinstance(source, str | Path) else open_source(source, cache)

    def find(entry: Path) -> Tokenizer | None:
        try:
            return load_tokenizer(entry)
        except DataError:  # not there, or damaged
            return None

    def make(temporary: Path) -> None:
        train_bpe(texts(opened), vocab).save(temporary)

    return cached(cache, f"bpe-{vocab}-{opened.identity()[:16]}", find, make)


def _from_json(path: Path) -> Tokenizer:
    companions = _companions(path.parent)
    config = _json_object(path.parent / "tokenizer_config.json", companions.get("tokenizer_config.json", "{}"))
    if config.get("plait_tokenizer") == ByteTokenizer.name:
        return ByteTokenizer()
    try:
        inner = tokenizers.Tokenizer.from_str(_text(path))
    except DataError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path}: not a Hugging Face tokenizer.json ({first_line(error)})") from None
    name = path.parent.resolve().name if path.name == "tokenizer.json" else path.stem
    return HuggingFaceTokenizer(inner, _end_of_text(inner, path, config, companions), name, companions)


def _from_gguf(path: Path) -> Tokenizer:
    from plait.data.tokenizer_gguf import tokenizer_files

    file = open_gguf(path)
    files = tokenizer_files(file)
    companions = {name: files[name] for name in COMPANIONS if name in files}
    inner = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    return HuggingFaceTokenizer(inner, file.field("tokenizer.ggml.eos_token_id"), path.stem, companions)


def _from_transformers(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        # said False, or transformers asks at the terminal whether to run code that came with the files
        loaded: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each of the library's formats fails in its own way
        raise DataError(
            f"{folder}: no tokenizer.json, and transformers cannot load this tokenizer ({first_line(error)})"
        ) from None
    if loaded.eos_token_id is None:
        raise _no_end(folder)
    name = folder.resolve().name
    if not loaded.is_fast:
        return PythonTokenizer(loaded, name)
    return HuggingFaceTokenizer(loaded.backend_tokenizer, loaded.eos_token_id, name, _companions(folder))


def _companions(folder: Path) -> dict[str, str]:
    texts = {name: _text(folder / name) for name in COMPANIONS if (folder / name).is_file()}
    _json_object(folder / ENDS, texts.get(ENDS, "{}"))
    return texts


def _end_of_text(inner: tokenizers.Tokenizer, path: Path, config: dict[str, Any], companions: dict[str, str]) -> int:
    """The id that ends a document, as the files beside tokenizer.json say, or else by its usual names."""
    special = _json_object(path.parent / "special_tokens_map.json", companions.get("special_tokens_map.json", "{}"))
    for said in (config.get("eos_token"), special.get("eos_token")):
        token = said.get("content") if isinstance(said, dict) else said
        if isinstance(token, str):
            id = inner.token_to_id(token)
            if id is None:
                raise DataError(f"{path}: its eos_token {token!r} is not in its vocabulary")
            return id
    for name in ("generation_config.json", "config.json"):
        beside = path.parent / name
        if beside.is_file():
            said = _json_object(beside, _text(beside)).get("eos_token_id")
            id = said[0] if isinstance(said, list) and said else said
            if isinstance(id, int):
                return id
    for token in USUAL_ENDS:
        id = inner.token_to_id(token)
        if id is not None:
            return id
    raise _no_end(path)


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except ValueError as error:
        raise DataError(str(error)) from None


def _json_object(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error.msg}, line {error.lineno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        raise DataError(f"{path}: JSON that cannot be read ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: {type(value).__name__} found; expected a JSON object")
    return value


def _no_end(path: Path) -> DataError:
    return DataError(f"{path}: no end-of-text token; expected an eos_token in tokenizer_config.json beside it")
