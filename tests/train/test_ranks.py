"""Two processes are one: what they compute, decide and leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plait.train import checkpoints, train
from plait.train.metrics import read_metrics
from plait.train.ranks import Distributed

# Rounding: gradients are summed in another order, and AdamW divides by their size.
ROUNDING = 1e-4

# A balance loss is of the tokens that it sees, and each rank sees its own; biases follow the loads of all.
EXPERTS = {"kind": "moe", "experts": 6, "hidden": 16, "bias_rate": 0.01, "balance_loss": 0.0}
DESIGN = {"dim": 64, "pattern": "GF AE", "layers": {"E": EXPERTS}}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="one process becomes two")
def test_two_processes_are_one(make_run, quiet, tmp_path):
    """Over documents as long as a sequence, so that no rank's share ends inside of one. Both stop where one gets a signal, and
    one process goes on from there; both stop where one's gradients are no numbers. A layer sleeps until then: the optimizer
    has not seen it."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"{number:02} {number * number:04} " * 3 + "tale")  # 28 letters and an end
    run = make_run(design=DESIGN, folder="alone", length=29, steps=4, sample_every=2, save_every=0, eval_every=0)
    run = run.replace(delayed={"A": 2}, data=run.data.replace(source=str(text)))
    alone = train(run, sample=lambda *_: "", console=quiet)
    script = [sys.executable, str(Path(__file__).with_name("two_ranks.py")), f"{run.folder}/run.yaml", str(tmp_path)]
    done = subprocess.run(
        script, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(2))
    assert [kind for kind, _ in first] == [kind for kind, _ in second] == ["Interrupted", "NonFinite"]
    assert first[0] == second[0] and first[0][1].startswith("stopped at step 2, saved")
    assert all(said[1][1].startswith("step 3: gradient norm is nan") for said in (first, second))
    assert not checkpoints(tmp_path / "broken") and len(checkpoints(tmp_path / "cut")) == 1
    resumed = train(run.replace(folder=str(tmp_path / "cut")), sample=lambda *_: "", console=quiet)
    for a, b in zip(alone.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=ROUNDING, atol=ROUNDING)
    assert alone.model.slots[-1].mixer.router_bias.any()
    for a, b in zip(alone.history, read_metrics(tmp_path / "cut" / "metrics.jsonl"), strict=True):
        assert a.keys() == b.keys()
        assert [a.get(key) for key in ("step", "lr", "tokens")] == [b.get(key) for key in ("step", "lr", "tokens")]
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=ROUNDING)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=ROUNDING)
        assert a.get("stats") == b.get("stats")  # tokens of each expert
        for layer, numbers in a.get("solver", {}).items():
            assert numbers["passes"] == b["solver"][layer]["passes"]


def test_ranks_without_a_group_say_what_is_missing():
    with pytest.raises(ValueError, match="call torch.distributed.init_process_group first"):
        Distributed()
