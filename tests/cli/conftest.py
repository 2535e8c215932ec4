"""Commands run in this process, and a model small enough to train in a second."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from plait.cli.app import run


@dataclass(frozen=True)
class Ran:
    """Exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def plait(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def call(*arguments: str) -> Ran:
        capsys.readouterr()
        code = run(arguments)
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps over a small text."""
    root = tmp_path_factory.mktemp("runs")
    text = root / "text.txt"
    text.write_text("def one():\n    return 1\n\n" * 200)
    folder = root / "small"
    arguments = [
        *(
            "train",
            "design=DF AF",
            "design.dim=64",
            f"folder={folder}",
            f"data.source={text}",
            f"data.cache={root}/cache",
        ),
        *("data.length=32", "steps=2", "batch=2", "warmup=0", "eval_tokens=64", "sample_every=2", "device=cpu"),
    ]
    assert run(arguments) == 0
    return folder
