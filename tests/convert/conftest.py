"""A small text, a teacher that has learned a little of it, and conversions of that."""

import io
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import plait
from plait.convert import Conversion
from plait.data import ByteTokenizer

WORDS = ["state", "mixer", "chunk", "decay", "gate", "norm", "delta", "window", "branch", "merge", "token", "prefix"]


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Thirty documents of a few hundred bytes."""
    folder = tmp_path_factory.mktemp("convert") / "text"
    folder.mkdir()
    draw = random.Random(0)
    for number in range(30):
        words = draw.choices(WORDS, k=draw.randrange(20, 120))
        (folder / f"{number:02}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def teacher_folder(text) -> Path:
    """A saved transformer of two blocks, its weights as they are drawn."""
    folder = text.parent / "teacher"
    plait.save(plait.build(plait.ModelConfig(vocab=257, dim=64, pattern="(AF)2"), seed=3), folder, ByteTokenizer())
    return folder


@pytest.fixture
def make_asked(text, teacher_folder, tmp_path) -> Callable[..., Conversion]:
    """A conversion to DF AF of 12 steps in all in tmp_path/out; keyword arguments change it."""

    def make(**changes) -> Conversion:
        data = {"source": str(text), "heldout": 0.2, "length": 32, "cache": str(text.parent / "cache")}
        own = {"teacher": str(teacher_folder), "out": str(tmp_path / "out"), "to": "DF AF", "data": data}
        shares = {"budget": 12 * 4 * 32, "align_share": 1 / 3, "device": "cpu"}
        return Conversion(**(own | shares | {"training": {"batch": 4, "eval_tokens": 256}} | changes))

    return make


@pytest.fixture
def quiet() -> Console:
    return Console(file=io.StringIO())
