"""The page that the code writes."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_reference_tells_of_runs_layers_and_functions(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    monkeypatch.setattr(generate, "HERE", tmp_path)
    generate.main()
    text = (tmp_path / "reference.md").read_text(encoding="utf-8")
    for line in ("## Runs", "`steps` = 1000", "### `GatedDeltaNet, kind: gated_deltanet`", "### `plait.engine.stream`"):
        assert line in text
    assert "features(tokens: Shaped[Tensor, 'b t ...'], state: Optional[S] = None" in text
