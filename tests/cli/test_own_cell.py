"""What docs/add-a-cell.md promises about cells of one's own, from the command line and in a process that starts anew."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "add-a-cell.md"
RUN = """
import: light
design: {dim: 64, pattern: ZF, layers: {Z: {kind: light, slope: 2.0}}}
data: {source: text.txt, length: 32, cache: cache}
steps: 1
batch: 1
warmup: 0
eval_tokens: 32
sample_every: 0
device: cpu
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A folder with the page's cell in it, and plait as it is in a new process afterwards."""
    from plait.design.layers import KINDS, LETTERS
    from plait.layers.recurrent import CELLS
    from plait.layers.stack import LAYERS

    tables, modules = [(table, dict(table)) for table in (KINDS, LETTERS, LAYERS, CELLS)], set(sys.modules)
    (tmp_path / "light.py").write_text(re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[1])
    (tmp_path / "text.txt").write_text("def one():\n    return 1\n\n" * 40)
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)

    def forget():
        for table, before in tables:
            table.clear()
            table.update(before)
        for name in {"light"} & set(sys.modules) - modules:
            del sys.modules[name]

    yield forget
    forget()


def test_a_pattern_takes_the_letter(plait):
    assert plait("show", "ZF").code == 1
    ran = plait("show", "ZF", "dim=64", "import=light", "layers.Z.slope=3", "--json")
    assert ran.code == 0, ran.err
    design = ran.json["design"]
    assert design["layers"] == {"Z": {"kind": "light", "gate_bias": [0.0, 3.0], "slope": 3.0}}
    assert design["import"] == ["light"]
    assert "next: plait train design=ZF design.dim=64 import=light design.layers.Z.slope=3" in ran.err


def test_a_run_names_the_module_and_a_new_process_goes_on(plait, workplace):
    ran = plait("train", "run.yaml", "--json")
    assert ran.code == 0, ran.err
    saved = json.loads((Path(ran.json["checkpoint"]) / "config.json").read_text())["design"]
    assert (saved["import"], saved["layers"]["Z"]) == (["light"], {"kind": "light", "slope": 2.0})

    workplace()  # as if the process were new
    assert plait("show", "run.yaml", "--json").json["design"] == saved
    workplace()
    assert plait("train", "runs/run", "device=cpu").code == 0
    workplace()
    refused = plait("generate", "runs/run", "def ", "--device", "cpu")
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "light" not in sys.modules
    assert "--import light" in refused.err
    for way in ("light", "light.py"):
        workplace()
        ran = plait("generate", "runs/run", "def ", "--max-tokens", "2", "--device", "cpu", "--import", way)
        assert ran.code == 0, ran.err
        assert ran.err.endswith(f"--import {way}\n")

    program = "import light, plait; print(plait.load('runs/run').design.slots[0].layer.slope)"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout == "2.0\n"


def test_a_file_may_lie_beside_the_run(plait, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ran = plait("show", "../run.yaml", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["design"]["import"] == ["light"]


def test_a_saved_model_runs_nothing(plait, tmp_path):
    import plait as library

    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\n")
    folder = tmp_path / "model"
    library.save(library.build({"vocab": 257, "dim": 64, "pattern": "AF"}), folder, library.load_tokenizer("bytes"))
    config = json.loads((folder / "config.json").read_text())
    config["design"] |= {"import": ["evil", str(tmp_path / "evil.py")]}
    (folder / "config.json").write_text(json.dumps(config))
    assert library.load(folder).design.pattern == "AF"
    assert plait("show", str(folder)).code == 0
    assert plait("generate", str(folder), "x", "--max-tokens", "1", "--device", "cpu").code == 0
    assert plait("show", str(folder), "dim=128").code == 0
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import not_there_at_all\n", "not_there_at_all"),
        ("def\n", "SyntaxError"),
        ("import plait, torch\nplait.register('A', int)\n", "register takes a subclass of plait.Cell"),
    ],
)
def test_a_module_that_fails_is_one_line(plait, tmp_path, text, said):
    (tmp_path / "broken_cells.py").write_text(text)
    ran = plait("show", "AF", "import=broken_cells")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert "broken_cells" in ran.err
    assert said in ran.err
    assert "broken_cells" not in sys.modules


@pytest.mark.parametrize("said", [3, "a b", ["x", 1], "../x", {"a": 1}, "x-y.txt"])
def test_what_is_no_module_is_refused(said):
    import plait as library

    with pytest.raises(ValueError, match=r"import: .*expected a (module|name)"):
        library.load_design({"vocab": 9, "dim": 64, "pattern": "AF", "import": said})
