"""A small corpus and runs over it."""

import io
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from plait.train import RunConfig

WORDS = ["state", "mixer", "chunk", "decay", "gate", "norm", "delta", "window", "branch", "merge", "token", "prefix"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Thirty documents of a few hundred bytes."""
    folder = tmp_path_factory.mktemp("corpus") / "text"
    folder.mkdir()
    draw = random.Random(0)
    for number in range(30):
        words = draw.choices(WORDS, k=draw.randrange(20, 120))
        (folder / f"{number:02}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


@pytest.fixture
def make_run(corpus, tmp_path) -> Callable[..., RunConfig]:
    """A run of 20 steps in tmp_path/run; keyword arguments change it."""

    def make(pattern: str = "AF", folder: str = "run", length: int = 32, **changes) -> RunConfig:
        data = {"source": str(corpus), "heldout": 0.2, "length": length, "cache": str(corpus.parent / "cache")}
        fields = {
            "design": {"dim": 64, "pattern": pattern},
            "data": data,
            "folder": str(tmp_path / folder),
            "steps": 20,
            "batch": 4,
            "eval_every": 10,
            "eval_tokens": 256,
            "sample_every": 0,
            "save_every": 10,
        }
        return RunConfig(**(fields | changes))

    return make


@pytest.fixture
def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture
def interrupt_once() -> Callable[..., Callable[..., str]]:
    """A sampler that sends this process a signal the first time it is asked, and draws a random number."""

    def make(number: int = signal.SIGINT) -> Callable[..., str]:
        sent = []

        def sample(model, tokenizer, prompt: str) -> str:
            if not sent:
                sent.append(True)
                signal.raise_signal(number)
            return f"{prompt} {torch.rand(1).item()}"

        return sample

    return make
