"""Which layers keep track of a state: parity and the S5 word problem, trained on 64 tokens, tested on up to 1,024.

    python benchmarks/state_tracking.py [--device cuda] [--jobs 16] [--out benchmarks/results/state_tracking.json]

Parity: the tokens are bits; the answer at each is whether the number of ones so far is odd. S5: the tokens are permutations of
five things, the first any of the 120, the others the identity, a swap or a 5-cycle, which generate them all; the answer is the
product so far. Every token is scored, so rows of 64 tokens train all lengths up to 64. S5 is the smallest group for which a
fixed number of attention or linear state-space layers is not enough at any width, as far as is known (arXiv 2404.08819).

All designs get the same: dim 64 (S5: 128), AdamW with warm-up and cosine, batches of rows of 4, 8, 16, 32 (a tenth of the
steps each) and then 64 tokens, each of the learning rates and seeds once. Cells go without their short convolution: it blurs
tokens each of which changes the state. "dense": all units hear each other, as those of a head do in S. "default": with its
convolution, as the letter comes. "negative": with eigenvalues in [-1, 1]. The table shows each
design's run with the lowest loss on rows of 128 tokens, tested on others. A run is a process, `--jobs` at a time. One that
has used up `--seconds` ends where it is, and says how many steps it made.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import plait
from plait.design import load_design
from plait.design.pattern import letters as letters_in
from plait.design.pattern import parse

CELLS = {"G": "gru", "H": "lstm", "S": "slstm"}
DESIGNS = (
    *("(AF)2", "(MF)2", "(DF)2", "(GF)2", "(HF)2", "(SF)2"),
    *("GFAF", "HFAF", "SFAF"),
    *("(GF)2 dense", "(HF)2 dense"),
    *("(GF)2 default", "(HF)2 default", "(SF)2 default"),
    *("(RF)2", "(HgF)2", "(MgF)2", "(MlF)2", "(MaF)2", "(XF)2", "(RnF)2", "(LiF)2", "(SgF)2"),
    *("(GlF)2", "(HtF)2", "(DnF)2", "(KF)2", "(RwF)2", "(DF)2 negative", "(DnF)2 negative", "(KF)2 negative"),
)
LENGTHS, CHOSEN_AT, TEST_ROWS, STAGES = (64, 256, 1024), 128, 256, (4, 8, 16, 32)
PERMUTATIONS = list(itertools.permutations(range(5)))
GENERATORS = [PERMUTATIONS.index(p) for p in ((0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (1, 2, 3, 4, 0))]
PRODUCTS = torch.tensor(
    [[PERMUTATIONS.index(tuple(p[i] for i in PERMUTATIONS[g])) for g in GENERATORS] for p in PERMUTATIONS]
)


def parity(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and answers, both (rows, length)."""
    bits = torch.randint(2, (rows, length))
    return bits, bits.cumsum(1) % 2


def s5(rows: int, length: int) -> tuple[Tensor, Tensor]:
    first, drawn = torch.randint(len(PERMUTATIONS), (rows,)), torch.randint(len(GENERATORS), (rows, length - 1))
    answers = [first]
    for g in drawn.unbind(1):
        answers.append(PRODUCTS[answers[-1], g])
    return torch.cat([first[:, None], torch.tensor(GENERATORS)[drawn]], 1), torch.stack(answers, 1)


TASKS = {"parity": (parity, 2, 64), "s5": (s5, len(PERMUTATIONS), 128)}  # rows, vocabulary, dim


def design_of(name: str | dict[str, Any], vocab: int, dim: int) -> plait.ModelConfig:
    """A pattern, and after it a word for what its letters are where that is not as said above; or a design as data."""
    if isinstance(name, dict):
        return load_design(name)
    pattern, *words = name.split()
    layers: dict[str, Any] = {}
    if "negative" in words:
        kinds = {"D": "gated_deltanet", "Dn": "deltanet", "K": "kimi_delta_attention"}
        letter = pattern.strip("()2").removesuffix("F")
        layers[letter] = {"kind": kinds[letter], "negative_eigenvalues": True}
    elif "default" not in words:
        dense = {"recurrence": "dense"} if "dense" in words else {}
        for letter in {letter.name for letter in letters_in(parse(pattern))} & set(CELLS):
            wide = {} if dense or letter == "S" else {"spread": 1.0}  # units that are alone must be able to flip
            layers[letter] = {"kind": CELLS[letter], "conv_width": None, **dense, **wide}
    return load_design({"vocab": vocab, "dim": dim, "pattern": pattern, "layers": layers, "tie_embeddings": False})


def scale(done: float, warmup: float = 0.05) -> float:
    """The learning rate when this share of the steps is done, as a share of its peak."""
    return (
        done / warmup if done < warmup else 0.01 + 0.99 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2
    )


def train(run: dict[str, Any]) -> dict[str, Any]:
    """One run and its tests, as a record."""
    rows, vocab, dim = TASKS[run["task"]]
    torch.manual_seed(run["seed"])
    model = plait.build(design_of(run["design"], vocab, dim), seed=run["seed"], device=run["device"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=run["lr"], betas=(0.9, 0.98), weight_decay=0.01)
    started, step = time.perf_counter(), 0
    while step < run["steps"] and time.perf_counter() - started < run["seconds"]:
        done = step / run["steps"]
        length = (*STAGES, *[LENGTHS[0]] * 10)[int(done * 10)]
        for group in optimizer.param_groups:
            group["lr"] = run["lr"] * scale(done)
        loss = loss_of(model, *rows(run["batch"], length))[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if run.get("verbose") and step % 100 == 0:
            print(step, length, loss.item(), file=sys.stderr, flush=True)
    seconds = time.perf_counter() - started
    record = {"steps_made": step, "train_s": round(seconds, 1), "chosen_by": test(model, rows, CHOSEN_AT)["loss"]}
    return run | record | {"tests": {n: test(model, rows, n) for n in LENGTHS}}


def loss_of(model: plait.LanguageModel, tokens: Tensor, answers: Tensor) -> tuple[Tensor, Tensor, plait.Channels]:
    """Mean loss, whether each token is right (rows, length), and what the layers say."""
    sent = plait.Channels()
    logits, answers = model(tokens.to(model.device), channels=sent)[0], answers.to(model.device)
    return F.cross_entropy(logits.flatten(0, 1), answers.flatten()), logits.argmax(-1) == answers, sent


@torch.no_grad()
def test(model: plait.LanguageModel, rows: Any, length: int) -> dict[str, float]:
    """Shares of right answers over all tokens and at the last, on rows that are the same for every run."""
    torch.manual_seed(length)
    loss, right, sent = loss_of(model, *rows(TEST_ROWS, length))
    found = {"loss": loss.item(), "right": right.double().mean().item(), "last": right[:, -1].double().mean().item()}
    solver = sent.over_layers("solver")
    return found | ({"passes": int(solver.passes)} if solver else {})


def in_process(run: dict[str, Any]) -> dict[str, Any]:
    """`train` in a process of its own, with one thread."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--run", json.dumps(run)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=one_thread)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return run | {"error": done.stderr.strip().splitlines()[-1]}
    record = json.loads(done.stdout.splitlines()[-1])
    tests = "  ".join(f"{n}: {found['right']:.1%}" for n, found in record["tests"].items())
    print(
        f"{run['task']} {run['design']:<12} lr {run['lr']:g} seed {run['seed']}  {record['train_s']:>6} s  {tests}",
        flush=True,
    )
    return record


def best(records: list[dict[str, Any]]) -> dict[str, Any]:
    return min(records, key=lambda record: record["chosen_by"])


def table(records: list[dict[str, Any]]) -> list[str]:
    """Markdown, a table a task."""
    lines = []
    for task in dict.fromkeys(record["task"] for record in records):
        heads = "".join(f" {n:,}: all tokens | last |" for n in LENGTHS)
        lines += ["", f"| {task} |{heads} runs that solve it |", "|---|" + "---:|" * (2 * len(LENGTHS) + 1)]
        for design in dict.fromkeys(record["design"] for record in records):
            runs = [r for r in records if r["design"] == design and r["task"] == task and "tests" in r]
            if not runs:
                continue
            tests = best(runs)["tests"].values()
            solved = sum(all(t["right"] > 0.99 and t["last"] > 0.99 for t in r["tests"].values()) for r in runs)
            cells = "".join(f" {t['right']:.1%} | {t['last']:.1%} |" for t in tests)
            lines.append(f"| `{design}` |{cells} {solved} of {len(runs)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--designs", default=",".join(DESIGNS))
    parser.add_argument("--lrs", default="0.003,0.01")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=300, help="of training a run, at most")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(train(args.run)))
        return
    shared = {"steps": args.steps, "batch": args.batch, "seconds": args.seconds, "device": args.device}
    runs = [
        {"task": task, "design": design, "lr": float(lr), "seed": seed, **shared}
        for task in reversed(args.tasks.split(","))
        for design in args.designs.split(",")
        for lr in args.lrs.split(",")
        for seed in range(args.seeds)
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        records = list(pool.map(in_process, runs))
    print("\n".join(table(records)))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps({"torch": torch.__version__, "runs": records}, indent=2) + "\n", encoding="utf-8"
        )
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
