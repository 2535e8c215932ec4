"""Text to token ids and back.

What every tokenizer here has in common: `encode` adds no special token and reads none in the text (a document that
talks about "<|endoftext|>" does not end there), `eos` ends a document, and `byte_lengths` says how many bytes of text
each id stands for, which is what bits per byte divide by.
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from plait.data.chat_template import ChatTemplate
from plait.data.errors import DataError
from plait.data.text import no_text
from plait.files import user_path, write_text

END_OF_TEXT = "<|endoftext|>"
REPLACEMENT = "\ufffd"


class TextStream(Protocol):
    """Ids in, text out as soon as it is certain; the parts joined are what `decode` gives for all ids, or what these add
    to the ids before them."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str:
        """What was held back: the beginning of a character that never ended, as U+FFFD."""
        ...


class Tokenizer(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def vocab(self) -> int:
        """Ids are 0 to vocab - 1."""
        ...

    @property
    def eos(self) -> int: ...

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids at which an answer in a chat ends: `eos`, those of a generation_config.json beside the tokenizer, and what its
        chat template writes after an answer."""
        ...

    @property
    def chat_template(self) -> ChatTemplate | None: ...

    @property
    def hash(self) -> str:
        """Hex digest; equal only if every text gets equal ids."""
        ...

    @property
    def byte_lengths(self) -> NDArray[np.int32]:
        """(vocab,) UTF-8 bytes of text per id; 0 for special tokens."""
        ...

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`. `special`: spelled-out special tokens (a rendered chat template's) become their ids."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """`encode` for many texts at once, on all cores where the tokenizer can."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of any run of ids; bytes that are not UTF-8 become U+FFFD, special tokens nothing."""
        ...

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """Text of ids as they come: what they add to the text of the ids `after` which they stand."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write files from which `load_tokenizer` and transformers' AutoTokenizer make the same tokenizer."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document."""

    name = "bytes"
    vocab = 257
    eos = 256
    ends = (256,)
    chat_template = None
    hash = hashlib.sha256(b"plait bytes 257").hexdigest()

    @property
    def byte_lengths(self) -> NDArray[np.int32]:
        return np.array([1] * 256 + [0], dtype=np.int32)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        if not special:
            return list(_utf8(text))
        first, *others = map(list, _utf8(text).split(END_OF_TEXT.encode()))
        return first + [token for part in others for token in (self.eos, *part)]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        return [np.frombuffer(_utf8(text), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self._bytes, ids)).decode("utf-8", errors="replace")

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        return _ByteStream(self._bytes, after)

    def save(self, folder: str | Path) -> None:
        folder = user_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "tokenizer.json", json.dumps(_bytes_as_bpe(), ensure_ascii=False, indent=1))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "plait_tokenizer": self.name,
        }
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    def _bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab:
            raise DataError(f"token {token} is not one of the byte tokenizer's ids, 0 to {self.vocab - 1}")
        return b"" if token == self.eos else bytes((token,))


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except (UnicodeEncodeError, AttributeError):
        raise no_text(text) from None


class _ByteStream:
    def __init__(self, to_bytes: Callable[[int], bytes], after: Sequence[int]):
        self._to_bytes = to_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(b"".join(map(to_bytes, after)))

    def push(self, token: int) -> str:
        return self._decoder.decode(self._to_bytes(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class PiecewiseStream:
    """Streaming over any `decode`: text is given out once it does not end inside a character.

    Only the ids since the last certain place are decoded again, and the few before them that a decoder needs to know
    whether it is at the start of a text, where many leave out the space that begins a word.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], after: Sequence[int] = ()):
        self._decode = decode
        self._ids = list(after)
        self._given = len(self._ids)  # ids whose text has been given out
        self._known = decode(self._ids)  # their text

    def push(self, token: int) -> str:
        self._ids.append(token)
        text, known = self._decode(self._ids), self._known
        if text.endswith(REPLACEMENT) or len(text) <= len(known):
            return ""
        self._ids, self._given = self._ids[self._given :], len(self._ids) - self._given
        self._known = self._decode(self._ids)
        return text[len(known) :]

    def finish(self) -> str:
        return self._decode(self._ids)[len(self._known) :]


def byte_alphabet() -> list[str]:
    """The printable character that byte-level tokenizers write for each of the 256 bytes (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


def _bytes_as_bpe() -> dict[str, object]:
    """The byte tokenizer as a byte-level BPE without merges, in the format of tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"id": 256, "content": END_OF_TEXT, "special": True, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [special | {"single_word": False, "lstrip": False, "rstrip": False}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {char: byte for byte, char in enumerate(byte_alphabet())}, "merges": []},
    }
