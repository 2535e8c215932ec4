"""The first thing a user types must answer at once."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "tokenizers", "numpy", "matplotlib", "jinja2")
PROGRAM = """
import json, sys
from plait.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert ended.code == 0, ended.code
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""


def start(*arguments: str) -> set[str]:
    """The modules that were loaded when a command had run."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(ended.stdout.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--help"], ["show"], ["show", "((DF)3 AF)6", "dim=768"], ["train", "--help"]])
def test_nothing_heavy_is_loaded(arguments):
    assert not start(*arguments) & set(HEAVY)


def test_generating_loads_no_compiler(tmp_path):
    import plait

    design = plait.ModelConfig(vocab=257, dim=64, pattern="D M W G H S [A|D]:gated [A|M]:merge_attention F")
    plait.save(plait.build(design), tmp_path, plait.load_tokenizer("bytes"))
    modules = start("generate", str(tmp_path), "x", "--max-tokens", "2", "--device", "cpu")
    assert "torch" in modules
    assert not modules & {"transformers", "sympy", "datasets", "matplotlib"}  # sympy: torch.compile's


def test_python_m_plait():
    ended = subprocess.run([sys.executable, "-m", "plait", "--version"], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("plait ")
