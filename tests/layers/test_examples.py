"""The examples do what they say."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from plait.design.layers import KINDS, LETTERS
from plait.layers.recurrent import CELLS
from plait.layers.stack import LAYERS

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def restored():
    """Letters that an example registers are gone after it."""
    tables = [(table, dict(table)) for table in (KINDS, LETTERS, LAYERS, CELLS)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_own_cell_learns_parity(monkeypatch, capsys):
    assert example("own_cell", monkeypatch).main() > 0.99
    assert "2048 tokens: 100" in capsys.readouterr().out
