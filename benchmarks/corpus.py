"""The text that SmolLM2's conversions are trained on here: books, entries of a dictionary, Python's documentation, in a folder.

    apt-get download dict-gcide python3.11-doc
    for package in *.deb; do dpkg -x $package packages; done
    python benchmarks/corpus.py BOOKS packages text

BOOKS is a folder of .txt files, a book each; two are passed over, so that they can be measured on. Of the dictionary (GCIDE)
every eighth entry is taken, of the documentation every source file. Each file of the output is some 50,000 characters of one
of these, and its name begins with which part it is, so that documents held out and read in order are of all kinds.
"""

import argparse
import gzip
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from plait.files import write_text

HELD_OUT = ("charles-darwin_the-voyage-of-the-beagle", "h-g-wells_the-war-of-the-worlds")
NOT_A_BOOK = "SOURCE"
GCIDE, PYTHON = "usr/share/dictd/gcide.dict.dz", "usr/share/doc/python3.11/html/_sources"
ENTRY = re.compile(r"\n\n(?=\w+[^\n]* \\)")  # a headword begins a line and its pronunciation stands between backslashes
EVERY, PART = 8, 50_000


def books(folder: Path) -> dict[str, str]:
    passed = (*HELD_OUT, NOT_A_BOOK)
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.txt") if path.stem not in passed}


def dictionary(packages: Path) -> str:
    with gzip.open(
        packages / GCIDE, "rt", encoding="utf-8", errors="replace"
    ) as file:  # a few bytes of it are not UTF-8
        return "\n\n".join(ENTRY.split(file.read())[1::EVERY])  # before the first stands who made it


def documentation(packages: Path) -> str:
    return "\n\n".join(path.read_text(encoding="utf-8") for path in sorted((packages / PYTHON).rglob("*.rst.txt")))


def parts(text: str) -> Iterator[str]:
    """Whole paragraphs."""
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + PART)
        end = len(text) if end < 0 else end + 2
        yield text[start:end]
        start = end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("books", "packages", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    texts = books(options.books) | {"gcide": dictionary(options.packages), "python": documentation(options.packages)}
    options.out.mkdir(parents=True)
    files, digest = 0, hashlib.sha256()
    for name, text in sorted(texts.items()):
        for number, part in enumerate(parts(text)):
            write_text(options.out / f"{number:03}_{name}.txt", part)
            files += 1
        digest.update(f"{name}\n{text}".encode())
    print(f"{files} files, {sum(map(len, texts.values())):,} characters, sha256 {digest.hexdigest()}")


if __name__ == "__main__":
    main()
