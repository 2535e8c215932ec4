"""What a step of the demo's models costs, and how much of it is the optimizer: ours beside torch.optim.Muon, in one process,
with the processor as it is and with AVX2 alone.

    python benchmarks/muon.py --out benchmarks/results/muon.json

The second process is this one again under the variables in PLAIN: a plain processor's instructions, not its clock or caches.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import nn

from plait.data import Loader, prepare
from plait.data.tokenizer import ByteTokenizer
from plait.evaluate.machine import machine
from plait.model import build
from plait.ops.instructions import cpu_bfloat16, fast_dtype
from plait.study.demo import VOCAB, demo_study
from plait.train.optim import Optimizers
from plait.train.step import backward

PLAIN = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
ROUNDS = 5


def timed(work: Any) -> float:
    """Milliseconds of the processor, which other work on the machine does not lengthen: all is done in one thread."""
    started = process_time()
    work()
    return 1e3 * (process_time() - started)


def measure(rounds: int) -> dict[str, Any]:
    """Each of the demo's models: its whole step, our optimizers in it, and torch's Muon on the same gradients."""
    torch.set_num_threads(1)
    study, rows = demo_study(), {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("def function(argument):\n    return argument\n\n" * 2_000, encoding="utf-8")
        shards = prepare(str(text), ByteTokenizer(), folder, heldout=0.05)
        for name in study.patterns:
            run = study.run(name, VOCAB)
            model = build(run.design)
            loader = Loader(shards, batch=run.batch, length=run.data.length)
            ours = Optimizers(model, run)
            matrices = [weight for group in ours.all[-1].param_groups for weight in group["params"]]
            theirs = torch.optim.Muon(matrices, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            times: dict[str, list[float]] = {"gradients": [], "optimizers": [], "torch_muon": []}
            for number in range(1 + rounds):
                batch = next(loader)
                found = {"gradients": timed(lambda: gradients(model, batch))}  # noqa: B023  (called at once)
                found["torch_muon"] = timed(theirs.step) if number < 3 else 0.0  # minutes, where it is slow
                found["optimizers"] = timed(lambda: ours.step(1))  # noqa: B023
                for what, ms in found.items():
                    if number and ms:  # the first allocates
                        times[what].append(ms)
            rows[name] = {f"{what}_ms": round(median(values), 2) for what, values in times.items()}
            rows[name] |= {"pattern": study.patterns[name], "tokens": run.batch * run.data.length}
            step = rows[name]["gradients_ms"] + rows[name]["optimizers_ms"]
            rows[name] |= {"tokens_per_s": round(1e3 * rows[name]["tokens"] / step)}
            rows[name] |= {"optimizers_share": round(rows[name]["optimizers_ms"] / step, 3)}
    facts = {"machine": machine(), "bfloat16": cpu_bfloat16(), "products": str(fast_dtype(torch.device("cpu")))}
    return facts | {"models": rows}


def gradients(model: nn.Module, batch: Any) -> None:
    backward(model, batch, 1, "float32")
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def under(variables: dict[str, str], rounds: int) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--here", "--rounds", str(rounds)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    arguments.add_argument("--here", action="store_true", help="Measure in this process and print.")
    asked = arguments.parse_args()
    if asked.here:
        print(json.dumps(measure(asked.rounds)))
        return
    data = {"as_it_is": under({}, asked.rounds), "plain": under(PLAIN, asked.rounds) | {"variables": PLAIN}}
    for name, row in data["plain"]["models"].items():
        print(name, data["as_it_is"]["models"][name], row, sep="\n  ")
    if asked.out:
        asked.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
