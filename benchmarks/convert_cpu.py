"""`plait convert` of the transformer that `plait demo` trains, on a CPU: how long it takes, and what is left of its perplexity.

    python benchmarks/convert_cpu.py --teacher runs/demo/transformer --out benchmarks/results/convert_cpu.json
    python benchmarks/convert_cpu.py --budget 200k --recipes all --out benchmarks/results/convert_recipes.json

The teacher is trained first where it is not there. Each recipe is a conversion in a process of its own, on as many threads as
OMP_NUM_THREADS says; seconds are those of the processor, which other work on the machine does not lengthen, beside the clock's.
Perplexity is over the held-out documents' first 32,768 tokens, in pieces as long as those trained on.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from plait.evaluate.machine import machine
from plait.files import write_text
from plait.study.demo import VOCAB, demo_study
from plait.train import latest, train

TO = "((DF)3 AF)"
# What differs from the defaults, as on the command line.
RECIPES: dict[str, list[str]] = {
    "default": [],
    "seed 1": ["seed=1"],
    "seed 2": ["seed=2"],
    "no calibration": ["calibrate=0"],
    "no alignment": ["align_share=0"],
    "neither": ["calibrate=0", "align_share=0"],
    "half for alignment": ["align_share=0.5"],
    "align.lr 0.003": ["align.lr=0.003"],
    "align.lr 0.03": ["align.lr=0.03"],
    "distil.lr 0.001": ["distil.lr=0.001"],
    "distil.lr 0.003": ["distil.lr=0.003"],
    "distil.lr 0.03": ["distil.lr=0.03"],
    "body 0.03": ["body=0.03"],
    "body 0.1": ["body=0.1"],
    "body 1": ["body=1"],
    "muon, lr 0.01": ["training={optimizer: muon, lr: 0.01}"],
    "0.3 cross-entropy": ["cross_entropy=0.3"],
    "own head": ["head=own"],
    "head retied": ["head=retied"],
    "lr_end 0.01": ["training.lr_end=0.01"],
    "batch 2": ["training.batch=2"],
}


def teacher_in(folder: Path) -> Path:
    """The demo's transformer, trained as the demo does where it is not there yet."""
    if latest(folder) is None:
        study = demo_study(folder=str(folder.parent))
        train(study.run("transformer", VOCAB).replace(folder=str(folder)))
    return folder


def convert(teacher: Path, budget: str | None, changes: list[str], out: Path) -> dict[str, Any]:
    """One conversion, and what it took of the processor and of the clock."""
    words = [str(teacher), *changes, "--to", TO, "--device", "cpu", "--out", str(out), "--json"]
    words += [] if budget is None else ["--budget", budget]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-m", "plait", "convert", *words], stdout=subprocess.PIPE, encoding="utf-8", check=True
    )
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
    data = json.loads(ran.stdout.splitlines()[-1])
    perplexity = {name: data[name]["measured"]["perplexity"] for name in ("teacher", "student")}
    stages = {
        name: {key: stage[key] for key in ("tokens", "seconds", "heldout")} for name, stage in data["stages"].items()
    }
    return {
        "changes": changes,
        "budget": data["asked"].get("budget"),
        "pattern": data["student"]["pattern"],
        "parameters": data["student"]["parameters"],
        "perplexity": perplexity | data["after"],
        "ratio": data["ratio"],
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "wall_s": wall,
        "stages": stages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=Path("runs/demo/transformer"))
    parser.add_argument("--budget", help="tokens of each conversion, as `plait convert` takes them; else its default")
    parser.add_argument("--recipes", nargs="+", default=["default"], help=f"all, or some of: {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, help="the JSON file to add the rows to")
    options = parser.parse_args()
    names = list(RECIPES) if options.recipes == ["all"] else options.recipes
    teacher = teacher_in(options.teacher)
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out and options.out.exists() else {}
    rows = known.get("rows", {})
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = convert(teacher, options.budget, RECIPES[name], Path(folder, "out"))
        print(f"{name}: {rows[name]['ratio']:.4f} in {rows[name]['cpu_s']:.0f} CPU seconds", flush=True)
        if options.out:
            facts = machine() | {"threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count()}
            write_text(options.out, json.dumps({"machine": facts, "to": TO, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
