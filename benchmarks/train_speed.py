"""Tokens a second in training, by size and pattern, on this machine's CPU.

    python benchmarks/train_speed.py [--out benchmarks/results/train_speed.json] [--page docs/choosing.md]

Each design is a run of plait's own, AdamW, float32, 4 sequences of 512 tokens a step, on Python's source. What counts is the
quickest step, so that other work on the machine counts little. Results are kept by machine: running it on another one adds
a column to the page. ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 shows what a plainer CPU would do.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from plait.design import load_design
from plait.design.count import parameters
from plait.design.summary import si
from plait.evaluate.machine import described, machine
from plait.files import write_text
from plait.train import RunConfig, train

VOCAB, BATCH, LENGTH = 4_096, 4, 512
DESIGNS = [
    ("(AF)4", 128),
    ("(DF)3 AF", 128),
    ("(AF)8", 256),
    ("((DF)3 AF)2", 256),
    ("(DF)8", 256),
    ("(MF)8", 256),
    ("([D|A]F)8", 256),
    ("(GF)8", 256),
    ("(AF)12", 512),
    ("((DF)3 AF)3", 512),
]
BEGIN, END = "<!-- train_speed: written by benchmarks/train_speed.py -->", "<!-- end -->"


def tokens_per_s(pattern: str, dim: int, steps: int, folder: Path) -> float:
    run = RunConfig(
        design={"vocab": VOCAB, "dim": dim, "pattern": pattern},
        data={"length": LENGTH, "cache": str(folder / "cache")},
        folder=str(folder / f"{dim}-{pattern.replace('|', '-')}"),
        steps=steps,
        batch=BATCH,
        device="cpu",
        eval_every=0,
        eval_tokens=1,
        save_every=0,
    )
    history = train(run, console=Console(quiet=True)).history
    return BATCH * LENGTH / min(record["step_s"] for record in history if "step_s" in record)


def table(by_machine: dict[str, dict[str, Any]]) -> str:
    """A row a design, a column a machine."""
    rows = [
        "| pattern | dim | parameters | " + " | ".join(by_machine) + " |",
        "|---|---:|---:|" + "---:|" * len(by_machine),
    ]
    for pattern, dim in DESIGNS:
        count = si(parameters(load_design(pattern, vocab=VOCAB, dim=dim)))
        cells = (
            f"{speeds[key]:,.0f}" if (key := f"{pattern} {dim}") in speeds else "" for speeds in by_machine.values()
        )
        rows.append(f"| `{pattern}` | {dim} | {count} | ".replace("|A]", r"\|A]") + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to add this machine's numbers to")
    parser.add_argument("--page", type=Path, help="the page whose table is to be written from it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    by_machine = json.loads(options.out.read_text(encoding="utf-8")) if options.out and options.out.exists() else {}
    facts = machine() | {"cores": options.threads}
    name = described(facts)
    speeds: dict[str, Any] = {"machine": facts}
    with tempfile.TemporaryDirectory() as folder:
        for pattern, dim in DESIGNS:
            speeds[f"{pattern} {dim}"] = tokens_per_s(pattern, dim, options.steps, Path(folder))
            print(f"{pattern}, dim {dim}: {speeds[f'{pattern} {dim}']:,.0f} tokens/s", flush=True)
    by_machine[name] = speeds
    if options.out:
        write_text(options.out, json.dumps(by_machine, indent=1) + "\n")
    if options.page:
        text = options.page.read_text(encoding="utf-8")
        inside = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
        write_text(options.page, inside.sub(lambda _: f"{BEGIN}\n{table(by_machine)}\n{END}", text))


if __name__ == "__main__":
    main()
