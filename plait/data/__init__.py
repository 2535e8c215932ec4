"""Text in, packed batches out: sources, tokenizers, token shards and the loader. Only the loader loads torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait.data.answer_writer import prepare_answers as prepare_answers
    from plait.data.answers import answers_in as answers_in
    from plait.data.corpus import Document as Document
    from plait.data.corpus import Source as Source
    from plait.data.corpus import open_source as open_source
    from plait.data.corpus import texts as texts
    from plait.data.errors import DataError as DataError
    from plait.data.errors import NotFound as NotFound
    from plait.data.errors import NotText as NotText
    from plait.data.loader import Batch as Batch
    from plait.data.loader import Loader as Loader
    from plait.data.shards import Meta as Meta
    from plait.data.shards import Shards as Shards
    from plait.data.tokenizer import ByteTokenizer as ByteTokenizer
    from plait.data.tokenizer import TextStream as TextStream
    from plait.data.tokenizer import Tokenizer as Tokenizer
    from plait.data.tokenizer_files import cached_bpe as cached_bpe
    from plait.data.tokenizer_files import load_tokenizer as load_tokenizer
    from plait.data.tokenizer_hf import train_bpe as train_bpe
    from plait.data.writer import prepare as prepare

_LAZY = {
    "Batch": "loader",
    "ByteTokenizer": "tokenizer",
    "DataError": "errors",
    "Document": "corpus",
    "Loader": "loader",
    "Meta": "shards",
    "NotFound": "errors",
    "NotText": "errors",
    "Shards": "shards",
    "Source": "corpus",
    "TextStream": "tokenizer",
    "Tokenizer": "tokenizer",
    "answers_in": "answers",
    "cached_bpe": "tokenizer_files",
    "load_tokenizer": "tokenizer_files",
    "open_source": "corpus",
    "prepare": "writer",
    "prepare_answers": "answer_writer",
    "texts": "corpus",
    "train_bpe": "tokenizer_hf",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"plait.data.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'plait.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
