"""What nonlinear cells start from: those that keep track of a state, and what that costs in text.

    python benchmarks/tracking_defaults.py [--device cuda] [--jobs 16] [--seeds 2] [--out FILE.json]

G, H and S as they come, without the short convolution, and with recurrent numbers that start in [-spread, spread]. Text: the
demo's hybrid with the letter in place of D, `(GF)3 AF`, its data and its training; bits per byte of what is held out. Parity:
`(GF)2` as in benchmarks/state_tracking.py, right answers at 64 and 256 tokens after training on 64.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from state_tracking import CELLS, TASKS
from state_tracking import train as train_tracking

import plait
from plait.study.demo import VOCAB, demo_study
from plait.train import train

VARIANTS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "no convolution": {"conv_width": None},
    "spread 1": {"spread": 1.0},
    "no convolution, spread 1": {"conv_width": None, "spread": 1.0},
}


def layers(run: dict[str, Any]) -> dict[str, Any]:
    changes = dict(VARIANTS[run["variant"]])
    if run["letter"] == "S":  # its matrices have no spread
        changes.pop("spread", None)
    return {run["letter"]: {"kind": CELLS[run["letter"]], **changes}}


def text(run: dict[str, Any], folder: str) -> float:
    """Bits per byte of the held-out text."""
    study = demo_study(folder=folder)
    name = "sequential"
    base = study.run(name, VOCAB)
    design = {"vocab": VOCAB, "dim": study.dim, "pattern": f"({run['letter']}F)3 AF", "layers": layers(run)}
    own = f"{folder}/{run['letter']} {run['variant']} {run['seed']}"
    result = train(
        base.replace(design=design, folder=own, seed=run["seed"], device=run["device"]), console=Console(quiet=True)
    )
    assert result.heldout is not None and result.heldout.bits_per_byte is not None
    return result.heldout.bits_per_byte


def one(run: dict[str, Any], folder: str) -> dict[str, Any]:
    if run["task"] == "text":
        return run | {"bits_per_byte": text(run, folder)}
    how = {
        "task": "parity",
        "lr": 0.003,
        "steps": run["steps"],
        "batch": 128,
        "seconds": 200.0,
        "device": run["device"],
    }
    design = plait.ModelConfig(
        vocab=2, dim=TASKS["parity"][2], pattern=f"({run['letter']}F)2", layers=layers(run), tie_embeddings=False
    )
    record = train_tracking(how | {"design": design.to_dict(), "seed": run["seed"]})
    return run | {"tests": record["tests"]}


def in_process(run: dict[str, Any], folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", json.dumps(run), "--folder", folder]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        return run | {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def rows(records: list[dict[str, Any]]) -> list[str]:
    """Markdown: seed by seed."""
    lines = ["| letter | variant | bits/byte | parity, right at 64 and 256 |", "|---|---|---|---|"]
    for letter, variant in itertools.product(CELLS, VARIANTS):
        mine = [r for r in records if (r["letter"], r["variant"]) == (letter, variant) and "error" not in r]
        bits = ", ".join(f"{r['bits_per_byte']:.4f}" for r in mine if r["task"] == "text")
        right = [r["tests"] for r in mine if r["task"] == "parity"]
        shares = ", ".join(f"{t['64']['right']:.0%} {t['256']['right']:.0%}" for t in right)
        lines.append(f"| {letter} | {variant} | {bits} | {shares} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="runs/tracking")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1200, help="of parity")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(one(args.run, args.folder)))
        return
    study = demo_study(folder=args.folder)
    from plait.train.inputs import open_tokenizer

    open_tokenizer(study.run("sequential", VOCAB).data)  # once, before many want it
    shared = {"device": args.device, "steps": args.steps}
    runs = [
        {"task": task, "letter": letter, "variant": variant, "seed": seed, **shared}
        for task in ("text", "parity")
        for letter, variant, seed in itertools.product(CELLS, VARIANTS, range(args.seeds))
        if letter != "S" or "spread" not in variant
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        records = list(pool.map(lambda run: in_process(run, args.folder), runs))
    print("\n".join(rows(records)))
    print(*{r["error"] for r in records if "error" in r}, sep="\n")
    if args.out:
        args.out.write_text(
            json.dumps({"torch": torch.__version__, "runs": records}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
