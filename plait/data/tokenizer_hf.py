"""Hugging Face tokenizers behind plait's protocol, and a byte-level BPE of one's own."""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from plait.data.chat_template import TEMPLATE, ChatTemplate, turn_end
from plait.data.errors import DataError, whole_number
from plait.data.text import is_text, no_text, whole_characters
from plait.data.tokenizer import END_OF_TEXT, PiecewiseStream, TextStream, Tokenizer
from plait.files import user_path, write_atomic, write_text

ENDS = "generation_config.json"
LARGEST = 1 << 20  # ids of a BPE made here: the library takes memory for all of them before it reads a word

RUN = re.compile(r"\S{1024}|\s{1024}")  # learning from a word takes the square of its length: no longer ones are given


class HuggingFaceTokenizer:
    """A `tokenizers.Tokenizer`. `companions`: the texts of the files saved beside its tokenizer.json, by name."""

    def __init__(self, inner: tokenizers.Tokenizer, eos: int, name: str, companions: Mapping[str, str]):
        inner.no_padding()
        inner.no_truncation()
        if inner.num_special_tokens_to_add(is_pair=False):  # plait never adds them, so nothing that reads our files may
            inner.post_processor = None
        end = inner.get_added_tokens_decoder().get(eos)
        if end is None or not end.special:
            inner.add_special_tokens([tokenizers.AddedToken(inner.id_to_token(eos), special=True, normalized=False)])
        self._special = inner
        self._json = inner.to_str()
        self._plain = tokenizers.Tokenizer.from_str(self._json)
        self._plain.encode_special_tokens = True  # the library's word for: as ordinary text
        self._companions = companions
        self._byte_lengths: NDArray[np.int32] | None = None
        self._ends: tuple[int, ...] | None = None
        self.name = name
        self.eos = eos
        self.vocab = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.hash = hashlib.sha256(f"{eos}:{self._json}".encode()).hexdigest()

    @property
    def ends(self) -> tuple[int, ...]:
        if self._ends is None:
            said = self._config(ENDS).get("eos_token_id")
            listed = [
                id for id in (said if isinstance(said, list) else [said]) if isinstance(id, int) and id < self.vocab
            ]
            self._ends = tuple(dict.fromkeys([self.eos, *listed, *_known_id(turn_end(self))]))
        return self._ends

    @property
    def chat_template(self) -> ChatTemplate | None:
        config = self._config("special_tokens_map.json") | self._config("tokenizer_config.json")
        text = _default(self._companions.get(TEMPLATE) or config.get("chat_template"))
        if text is None:
            return None
        tokens = {name: _content(token) for name, token in config.items() if name.endswith("_token")}
        special = {name: token for name, token in tokens.items() if token is not None}
        return ChatTemplate(text, {"eos_token": str(self._special.id_to_token(self.eos))} | special)

    @property
    def byte_lengths(self) -> NDArray[np.int32]:
        if self._byte_lengths is None:
            added = self._special.get_added_tokens_decoder()
            ordinary = {id: token for token, id in self._special.get_vocab(with_added_tokens=False).items()}
            lengths = np.zeros(self.vocab, dtype=np.int32)
            if '"ByteLevel"' in json.dumps(json.loads(self._json)["decoder"]):
                for id, token in ordinary.items():
                    lengths[id] = len(token)  # one character a byte
            else:
                measure_bytes(self, ordinary, lengths)
            for id, token in added.items():
                lengths[id] = 0 if token.special else len(token.content.encode())
            self._byte_lengths = lengths
        return self._byte_lengths

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        inner = self._special if special else self._plain
        try:
            return inner.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise no_text(text) from None

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        try:
            done = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise next((no_text(text) for text in texts if not is_text(text)), no_text(texts)) from None
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in done]

    def decode(self, ids: Iterable[int]) -> str:
        return self._plain.decode([int(id) for id in ids], skip_special_tokens=True)

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        return PiecewiseStream(self.decode, after)

    def save(self, folder: str | Path) -> None:
        folder = user_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        template = self._companions.get(TEMPLATE, "")
        special = self._config("special_tokens_map.json")
        config = _saved_config(self._special, self.eos, template, special | self._config("tokenizer_config.json"))
        files = {
            "tokenizer.json": self._special.to_str(pretty=True),
            **self._companions,
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }
        if special:
            said_again = {name: config[name] for name in special if name in config}
            files["special_tokens_map.json"] = json.dumps(said_again, indent=2) + "\n"
        for name, text in files.items():
            write_text(folder / name, text)

    def _config(self, name: str) -> dict[str, Any]:
        return json.loads(self._companions.get(name, "{}"))


class PythonTokenizer:
    """A transformers tokenizer that is written in Python and has no tokenizer.json: right, and slow."""

    def __init__(self, inner: Any, name: str):
        self._inner = inner
        self._byte_lengths: NDArray[np.int32] | None = None
        self.name = name
        self.eos: int = inner.eos_token_id
        self._vocab: dict[str, int] = inner.get_vocab()
        self.vocab = max(self._vocab.values()) + 1
        identity = [type(inner).__name__, self.eos, sorted(self._vocab.items())]
        self.hash = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys([self.eos, *_known_id(turn_end(self))]))

    @property
    def chat_template(self) -> ChatTemplate | None:
        text = _default(self._inner.chat_template)
        return None if text is None else ChatTemplate(text, self._inner.special_tokens_map)

    @property
    def byte_lengths(self) -> NDArray[np.int32]:
        if self._byte_lengths is None:
            self._byte_lengths = np.zeros(self.vocab, dtype=np.int32)
            special = set(self._inner.all_special_ids)
            ordinary = {id: token for token, id in self._vocab.items() if id not in special}
            measure_bytes(self, ordinary, self._byte_lengths)
        return self._byte_lengths

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        if not is_text(text):
            raise no_text(text)
        return self._inner.encode(text, add_special_tokens=False, split_special_tokens=not special)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        return [np.array(self.encode(text), dtype=np.uint32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        numbers = [int(id) for id in ids]
        return self._inner.decode(numbers, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        return PiecewiseStream(self.decode, after)

    def save(self, folder: str | Path) -> None:
        if self._inner.pad_token is None:
            self._inner.pad_token = self._inner.eos_token
        self._inner.padding_side = "left"
        with tempfile.TemporaryDirectory() as temporary:
            self._inner.save_pretrained(temporary)
            for path in sorted(Path(temporary).iterdir()):
                write_atomic(user_path(folder) / path.name, partial(shutil.copyfile, path))


# What a tokenizer_config.json may say that tokenizer.json says better, or that names code which is not saved.
_OVERRULED = ("auto_map", "add_prefix_space", "tokenizer_file", "vocab_file", "from_slow", "legacy")
_MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")


def _saved_config(
    inner: tokenizers.Tokenizer, eos: int, chat_template: str, config: Mapping[str, Any]
) -> dict[str, Any]:
    """`config` so that transformers reads tokenizer.json as it is: nothing added around a text, no token that the
    vocabulary lacks (its new id would be outside the model's), and padding where decoding can bear it."""
    kept = {name: value for name, value in config.items() if name not in _OVERRULED}
    for name, value in config.items():
        if name in _MORE_SPECIAL and isinstance(value, list):
            kept[name] = [token for token in value if _known(inner, token)]
        elif name in _MORE_SPECIAL and isinstance(value, dict):
            kept[name] = {key: token for key, token in value.items() if _known(inner, token)}
        elif name.endswith("_token") and not isinstance(value, bool) and not _known(inner, value):
            del kept[name]
    # a beginning of text that no text began with in training, unless a chat is written with it
    if "bos_token" not in chat_template + str(config.get("chat_template", "")):
        kept.pop("bos_token", None)
    end = inner.id_to_token(eos)
    return (
        {"pad_token": end}
        | kept
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "add_bos_token": False,
            "add_eos_token": False,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
    )


def _known(inner: tokenizers.Tokenizer, token: Any) -> bool:
    content = _content(token)
    return content is not None and inner.token_to_id(content) is not None


def _content(token: Any) -> str | None:
    """A special token as the files spell it: its text, or a mapping with that."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _default(template: Any) -> str | None:
    """The chat template of a tokenizer that may have several by name."""
    if isinstance(template, list):
        template = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
    return template.get("default") if isinstance(template, dict) else template or None


def _known_id(id: int | None) -> tuple[int, ...]:
    return () if id is None else (id,)


def measure_bytes(tokenizer: Tokenizer, tokens: Mapping[int, str], lengths: NDArray[np.int32]) -> None:
    """Set `lengths[id]` to the bytes that each id adds after an ordinary word: also where decoding makes spaces."""
    before = tokenizer.encode("a")
    base = len(tokenizer.decode(before).encode())
    for id, token in tokens.items():
        if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):  # byte fallback
            lengths[id] = 1
            continue
        text = tokenizer.decode([*before, id])
        # One token that is part of a character decodes to U+FFFD, three bytes, but is a byte itself.
        lengths[id] = max(1, len(text.replace("\ufffd", "?").encode()) - base)


def train_bpe(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab` ids: the end of text, 256 bytes and merges. Equal texts give equal ids.

    `texts` is read once, in a stream; `plait.data.texts(source)` is one. Raises DataError where there is no text.
    """
    vocab = bpe_size(vocab)
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counted = _Counted(texts)
    inner.train_from_iterator(counted, trainer=trainer)
    if not counted.characters:
        raise DataError("no text to train a tokenizer on; expected at least one document")
    return HuggingFaceTokenizer(inner, inner.get_vocab()[END_OF_TEXT], f"bpe-{inner.get_vocab_size()}", {})


def bpe_size(vocab: int) -> int:
    """A vocabulary that `train_bpe` can make; raises DataError for another."""
    return whole_number("a byte-level BPE with vocab", vocab, 257, LARGEST)


class _Counted:
    """Texts, counting their characters on the way through."""

    def __init__(self, texts: Iterable[str]):
        self._texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            text = whole_characters(text)
            self.characters += len(text)
            start = 0
            for run in RUN.finditer(text):
                yield text[start : run.end()]
                start = run.end()
            yield text[start:]
