"""Text of any length, read in pieces that together are the text, so that no file is ever in memory whole.

A piece ends before a single space between two words, which is where a byte-level BPE would have ended a word anyway:
the tokens of the pieces are the tokens of the whole.
"""

import codecs
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from plait.data.errors import NotText

PIECE = 1 << 16  # bytes read at once; characters in a piece of a long string
SNIFFED = 8192  # a zero byte among the first bytes means binary, git's rule
WINDOW = 4096  # characters at the end of a piece searched for a place to cut

_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")
_BLANK = re.compile(r"(?<=\S)[ \t\r\n]+(?=\S)")


def read_pieces(path: Path, piece: int = PIECE) -> Iterator[str]:
    """The UTF-8 text of a file in pieces of about `piece` bytes; raises NotText at the first byte that is not."""
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


def _cut_point(text: str) -> int:
    start = max(0, len(text) - WINDOW)
    tail = text[start:]
    for pattern in (_BETWEEN_WORDS, _BLANK):
        places = [match.start() for match in pattern.finditer(tail)]
        if places:
            return start + places[-1]
    return len(text)  # no blank in the window: any character boundary will do


def _decoded_blocks(path: Path, size: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset = 0
    with path.open("rb", buffering=0) as file:
        while True:
            block = file.read(size)
            if offset == 0 and b"\0" in block[:SNIFFED]:
                raise NotText(f"{path}: a binary file (a zero byte at {block.index(0)}); expected UTF-8 text")
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset + len(block) - len(error.object) + error.start
                bad = error.object[error.start]
                raise NotText(f"{path}: byte {at} (0x{bad:02x}) is not UTF-8; expected UTF-8 text") from None
            if text:
                yield text
            if not block:
                return
            offset += len(block)
