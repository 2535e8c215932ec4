"""Text of any length, read in pieces that together are the text, so that no file is ever in memory whole.

A piece ends before a single space between two words, which is where a byte-level BPE would have ended a word anyway:
the tokens of the pieces are the tokens of the whole.
"""

import codecs
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from plait.data.errors import DataError, NotText
from plait.files import OTHER_UNICODE, not_utf8

PIECE = 1 << 16  # bytes read at once; characters in a piece of a long string
SNIFFED = 8192  # a zero byte among the first bytes means binary, git's rule
WINDOW = 4096  # characters at the end of a piece searched for a place to cut
PACKED = re.compile(
    rb"(?P<gzip>\x1f\x8b)|(?P<bzip2>BZh\d1AY&SY)|(?P<xz>\xfd7zXZ\0)|(?P<zstandard>\x28\xb5\x2f\xfd)|(?P<zip>PK\3\4)"
)

_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")
_BLANK = re.compile(r"(?<=\S)[ \t\r\n]+(?=\S)")
_HALF = re.compile("[\ud800-\udfff]")


def read_pieces(path: Path, piece: int = PIECE) -> Iterator[str]:
    """The UTF-8 text of a file, without a byte order mark at its head, in pieces of about `piece` bytes; raises NotText
    at the first byte that is not."""
    return join_at_words(_decoded_blocks(path, piece))


def cut_pieces(text: str, piece: int = PIECE) -> Iterator[str]:
    """A string in pieces of about `piece` characters; a shorter one is one piece."""
    return join_at_words(text[start : start + piece] for start in range(0, len(text), piece))


def join_at_words(blocks: Iterable[str]) -> Iterator[str]:
    """The same text as `blocks`, with the ends moved to where words end."""
    held = ""
    for block in blocks:
        if held:
            cut = _cut_point(held)
            yield held[:cut]
            held = held[cut:] + block
        else:
            held = block
    if held:
        yield held


def whole_characters(text: str) -> str:
    """Text that UTF-8 can hold: halves of a surrogate pair, which JSON can spell, are joined or become U+FFFD."""
    if is_text(text):
        return text
    if not isinstance(text, str):
        raise no_text(text)
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def is_text(text: object) -> bool:
    """Whether UTF-8 can hold `text`."""
    return isinstance(text, str) and (text.isascii() or not _HALF.search(text))


def no_text(text: object) -> DataError:
    """Why a tokenizer cannot encode `text`."""
    if not isinstance(text, str):
        return DataError(f"text is of type {type(text).__name__}; expected str")
    half = _HALF.search(text)
    if half and "\udc80" <= half[0] <= "\udcff":  # how Python carries a byte that it could not decode
        return DataError(
            f"text: character {half.start()} is the byte 0x{ord(half[0]) - 0xDC00:02x}, not UTF-8; expected UTF-8 text"
        )
    where = f"character {half.start()} (U+{ord(half[0]):04X})" if half else "a character"
    return DataError(f"text: {where} is half of a surrogate pair; expected Unicode text that UTF-8 can hold")


def _cut_point(text: str) -> int:
    start = max(0, len(text) - WINDOW)
    tail = text[start:]
    for pattern in (_BETWEEN_WORDS, _BLANK):
        places = [match.start() for match in pattern.finditer(tail)]
        if places:
            return start + places[-1]
    return len(text)  # no blank in the window: any character boundary will do


def _decoded_blocks(path: Path, size: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")("strict")
    offset = 0
    with path.open("rb", buffering=0) as file:
        while True:
            block = file.read(size)
            if offset == 0:
                _refuse_other_files(block, path)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                begins = offset + len(block) - len(error.object)
                raise NotText(f"{path}: {not_utf8(error.object, error.start, begins)}") from None
            if text:
                yield text
            if not block:
                return
            offset += len(block)


def _refuse_other_files(head: bytes, path: Path) -> None:
    """Raise NotText for what a file's first bytes show not to be plain text."""
    packed = PACKED.match(head)
    if packed:
        raise NotText(f"{path}: compressed ({packed.lastgroup}); expected UTF-8 text, unpack it first")
    if head[:2] in OTHER_UNICODE:
        raise NotText(f"{path}: {not_utf8(head, 0)}")
    if b"\0" in head[:SNIFFED]:
        raise NotText(f"{path}: a binary file (a zero byte at {head.index(0)}); expected UTF-8 text")
