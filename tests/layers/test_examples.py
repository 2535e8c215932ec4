"""The examples run as they stand, in processes of their own: they register letters."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_own_cell_learns_parity():
    script = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import torch, own_cell; torch.set_num_threads(1); "
    run = subprocess.run(
        [sys.executable, "-c", script + "assert own_cell.main() > 0.99"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "2048 tokens: 100" in run.stdout
