"""What `plait convert` makes of one teacher at equal budgets: a row a kind of target, and a row a rule that chooses what stays.

    python benchmarks/convert_table.py --budget 20M --text "books/*.txt" --tasks lm-eval-data --out table.json
    python benchmarks/convert_table.py --teacher runs/demo/transformer --text stdlib --budget 200k --device cpu --out table.json
    python benchmarks/convert_table.py --show table.json

A row that is in the JSON file is skipped, and the file is written anew, whole, after every row. A conversion that was stopped,
or could not be measured, is kept in a folder beside the file and goes on from there. With --jobs 3 three conversions at a time
share each GPU, each with a log in that folder. Rows of one file have the same teacher, budget and text.
Kinds stand where a quarter of the attention layers stays, evenly spread, but for those that say otherwise; rules choose which
quarter stays of `D`. Perplexity is over held-out documents, in pieces as long as those trained on.
"""

import argparse
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from gpus import gpus
from rich.console import Console

from plait.cli.convert import COMMONSENSE, count, known_data, scores
from plait.convert import RULES, Conversion, Plan, Stages, attention_places
from plait.convert.results import perplexity
from plait.convert.scores import Request
from plait.convert.select import choose
from plait.data import Tokenizer
from plait.design.count import parameters, state_bytes
from plait.evaluate.machine import machine
from plait.evaluate.recall import DEPTHS, fitting, measure, needle_kinds
from plait.evaluate.tasks import find_file, run_task
from plait.files import write_text
from plait.model import LanguageModel
from plait.opening import load

TEACHER = "teacher"
QUARTER = "25%"
FAR = 16_384  # tokens of context that states are compared at
PREFIX = 4  # tokens of a window's permanent beginning
FINISH = 0.2  # of the budget, after pruning

Replace = Callable[[LanguageModel, int], dict[str, Any]]  # by address, what takes its place; of text in pieces so long


@dataclass(frozen=True)
class Row:
    """How a conversion differs from the others: by what it asks for, or by a plan of its own."""

    asks: dict[str, Any] = field(default_factory=dict)
    plan: Replace | None = None


def kind(mixer: str, select: str = "uniform", keep: str | int = QUARTER) -> Row:
    return Row({"mixer": [mixer], "keep": keep, "select": select})


def small_latents(teacher: LanguageModel, length: int) -> dict[str, Any]:
    """Latent attention everywhere, with a quarter of what attention remembers of a token."""
    found = {}
    for address, old in attention_places(teacher.design).items():
        turned = 0 if old.rope is None else max(2, old.rope.rotated(old.head_dim) // 4 * 2)
        rank = 2 * old.kv_heads * old.head_dim // 4 - turned
        found[address] = {"kind": "latent_attention", "rank": max(8, rank)} | ({"rope_dim": turned} if turned else {})
    return found


def windows(teacher: LanguageModel, length: int) -> dict[str, Any]:
    """Windows of a quarter of the length and a permanent beginning, where the even rule keeps no attention."""
    places, mixer = (
        list(attention_places(teacher.design)),
        {"window": max(1, length // 4), "prefix": PREFIX, "sinks": True},
    )
    keep = round(len(places) / 4)
    even = choose(RULES["uniform"](teacher, Request(mixer=mixer, keep=keep), ()).scores, keep, "uniform")
    return {address: mixer for address in places if address not in even}


def last_half(teacher: LanguageModel, length: int) -> dict[str, Any]:
    """What stays is spread evenly over the last half of the depth."""
    places = list(attention_places(teacher.design))
    keep, late = round(len(places) / 4), places[len(places) // 2 :]
    stay = {late[(2 * i + 1) * len(late) // (2 * keep)] for i in range(keep)}
    return {address: "gated_deltanet" for address in places if address not in stay}


KINDS: dict[str, Row] = {
    "L 25% + M": Row({"to": "((MF)3 LF)"}),
    "L, a quarter of the cache": Row(plan=small_latents),
    "D": kind("D"),
    "K": kind("K"),
    "X": kind("X"),
    "G": kind("G"),
    "window + sinks": Row(plan=windows),
    "D everywhere": kind("D", keep=0),
    "[D|A] pruned to 25%": Row({"mixer": ["[D|A]"], "keep": 0, "prune": QUARTER, "finish_share": FINISH}),
    "[D|A]": Row({"mixer": ["[D|A]"], "keep": 0, "price": 0.0, "cross_entropy": 0.1}),
}
SELECTIONS: dict[str, Row] = {
    "D by kl": kind("D", "kl"),
    "D by recall": kind("D", "recall"),
    "D by halo": kind("D", "halo"),
    "D, last half": Row(plan=last_half),
}
ROWS = KINDS | SELECTIONS  # the even rule's row is "D"
GROUPS = {"kinds": list(KINDS), "selections": list(SELECTIONS), "all": list(ROWS)}


def asked(options: argparse.Namespace, row: Row, seed: int, out: Path) -> Conversion:
    data = known_data(options.teacher) | {"length": options.length, "heldout": options.heldout, "cache": options.cache}
    return Conversion(
        teacher=options.teacher,
        out=str(out),
        data=data | {"source": options.text},
        budget=count(options.budget),
        seed=seed,
        device=options.device,
        training={"eval_tokens": options.eval_tokens, "compile": options.compile}
        | ({"batch": options.batch} if options.batch else {}),
        **({"select_tokens": options.select_tokens} if options.select_tokens else {}),
        **row.asks,
    )


def converted(options: argparse.Namespace, row: Row, seed: int, out: Path) -> dict[str, Any]:
    """One conversion, and what is measured of it."""
    ask, started = asked(options, row, seed, out), time.perf_counter()
    stages = Stages(ask, Console(stderr=True), scores(ask, options.tasks))
    if row.plan is not None and not (out / "plan.yaml").is_file():
        out.mkdir(parents=True, exist_ok=True)
        plan = Plan.of(stages.teacher, ask.teacher, row.plan(stages.teacher, options.length), seed=seed)
        plan.write(out / "plan.yaml")
    stages.upto("model")
    seconds, student = time.perf_counter() - started, load(out, stages.device, torch.float32)
    cost = stages.plan.cost
    return {
        "asked": {name: value for name, value in ask.to_dict().items() if name != "out"},
        "keep": list(stages.plan.keep),
        "tokens": trained_tokens(stages),
        "tokens_of_rule": cost.tokens,
        "seconds": seconds,
        "seconds_of_rule": cost.seconds,
        **measured(options, stages, student),
        "perplexity_transfer": perplexity(stages, load(out / "transfer", stages.device, torch.float32)),
    }


def trained_tokens(stages: Stages) -> int:
    """That the training stages read."""
    return sum(run.steps * run.batch * run.data.length for run in stages.asked.runs().values())


def measured(options: argparse.Namespace, stages: Stages, model: LanguageModel) -> dict[str, Any]:
    tokenizer = stages.tokenizer
    return {
        "pattern": model.design.pattern,
        "parameters": parameters(model.design),
        "perplexity": perplexity(stages, model),
        "needle": needle(options, model, tokenizer),
        "commonsense": commonsense(options, model, tokenizer),
        "state_bytes": state_bytes(model.design, FAR, "bfloat16"),
    }


def needle(options: argparse.Namespace, model: LanguageModel, tokenizer: Tokenizer) -> dict[str, float]:
    """The share of needles chosen right, over all depths, by length."""
    found: dict[str, float] = {}
    for length in fitting(model, options.needle):
        cells = measure(
            model,
            tokenizer,
            needle_kinds([length], DEPTHS),
            text=options.text,
            questions=options.questions,
            write=False,
        )
        found[str(length)] = sum(cell.chosen for cell in cells) / sum(cell.questions for cell in cells)
    return found


def commonsense(options: argparse.Namespace, model: LanguageModel, tokenizer: Tokenizer) -> dict[str, float]:
    """Accuracies, where there are files of lm-eval's."""
    if options.tasks is None:
        return {}
    tasks = {task: run_task(model, tokenizer, task, options.tasks, limit=options.records) for task in COMMONSENSE}
    return {task: result.metrics["acc"] for task, result in tasks.items()}


SAME = (
    "teacher",
    "budget",
    "length",
    "batch",
    "select_tokens",
    "text",
    "heldout",
    "eval_tokens",
    "needle",
    "questions",
    "tasks",
    "records",
)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return json.loads(json.dumps({name: getattr(options, name) for name in SAME}))


def opened(options: argparse.Namespace) -> dict[str, Any]:
    """The table as far as it goes. Ends the program where the file's rows are of other settings."""
    if not options.out.is_file():
        return {"settings": settings(options), "machine": machine(), "rows": {}}
    table = json.loads(options.out.read_text(encoding="utf-8"))
    for name, value in settings(options).items():
        if table["settings"].get(name) != value:
            sys.exit(f"{options.out} has rows of --{name} {table['settings'][name]}, not {value}: give another --out")
    return table


def teacher_row(options: argparse.Namespace) -> dict[str, Any]:
    """What is measured of the teacher, once."""
    stages = Stages(asked(options, ROWS["D"], 0, Path("unused")), Console(stderr=True))
    return measured(options, stages, stages.teacher)


def shown(table: dict[str, Any]) -> str:
    """The table as Markdown: means over seeds, and of perplexity how far apart they are."""
    teacher = table["teacher"]
    lines = [
        "| row | pattern | tokens | seconds | perplexity / teacher's | needle | commonsense | state at 16k |",
        "|---|---|---|---|---|---|---|---|",
        f"| teacher | `{teacher['pattern']}` | | | {teacher['perplexity']:.3f} | {shares(teacher['needle'])} | "
        f"{average(teacher['commonsense'])} | {teacher['state_bytes']:,} |",
    ]
    for name, seeds in table["rows"].items():
        runs = list(seeds.values())
        ratios = [run["perplexity"] / teacher["perplexity"] for run in runs]
        apart = f" ({min(ratios):.3f} to {max(ratios):.3f})" if len(ratios) > 1 else ""
        mean = {key: sum(run[key] for run in runs) / len(runs) for key in ("tokens", "seconds", "state_bytes")}
        needles = {n: sum(run["needle"][n] for run in runs) / len(runs) for n in runs[0]["needle"]}
        tasks = {n: sum(run["commonsense"][n] for run in runs) / len(runs) for n in runs[0]["commonsense"]}
        lines.append(
            f"| {cell(name)} | `{cell(runs[0]['pattern'])}` | {mean['tokens']:,.0f} | "
            f"{mean['seconds']:,.0f} | {sum(ratios) / len(ratios):.3f}{apart} | {shares(needles)} | {average(tasks)} | "
            f"{mean['state_bytes'] / teacher['state_bytes']:.3f} |"
        )
    return "\n".join(lines)


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def shares(values: dict[str, float]) -> str:
    return ", ".join(f"{value:.2f} at {int(length):,}" for length, value in values.items())


def average(values: dict[str, float]) -> str:
    return f"{sum(values.values()) / len(values):.3f}" if values else ""


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="smollm2", help="what plait.load takes")
    parser.add_argument(
        "--rows", nargs="+", default=["all"], help=f"{', '.join(GROUPS)}, or some of: {', '.join(ROWS)}"
    )
    parser.add_argument("--budget", default="5M", help="tokens that each conversion trains on")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--length", type=int, default=1024, help="tokens of a piece of text")
    parser.add_argument(
        "--batch", type=int, help="sequences in a step, of all stages; else as `plait convert` has them"
    )
    parser.add_argument("--select-tokens", type=int, help="that rules measure on; else as `plait convert` has them")
    parser.add_argument("--compile", action="store_true", help="as `training.compile=true`")
    parser.add_argument("--text", default="stdlib", help="a source of text, as `plait convert --data` takes it")
    parser.add_argument(
        "--heldout", type=float, default=0.05, help="the share of its documents that perplexity is over"
    )
    parser.add_argument("--eval-tokens", type=int, default=131_072, help="of these, at most")
    parser.add_argument(
        "--needle", nargs="*", type=int, default=[1024, 4096], help="lengths at which a needle is looked for"
    )
    parser.add_argument("--questions", type=int, default=10, help="needles of each length and depth")
    parser.add_argument("--tasks", help="the folder of lm-eval's files; without it commonsense is not measured")
    parser.add_argument("--records", type=int, default=500, help="of each task, the first")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cache", default="runs/cache", help="where the tokenized text is kept")
    parser.add_argument("--folder", type=Path, help="where conversions are kept; else only until they are measured")
    parser.add_argument("--jobs", type=int, default=1, help="conversions at a time on each GPU")
    parser.add_argument(
        "--out", type=Path, default=Path("convert_table.json"), help="the JSON file that rows are added to"
    )
    parser.add_argument("--show", type=Path, help="print the table of a JSON file, and no more")
    options = parser.parse_args()
    options.workers = options.jobs * len(gpus())
    options.rows = [name for word in options.rows for name in GROUPS.get(word, [word])]
    for name in options.rows:
        if name not in ROWS:
            parser.error(f"there is no row {name!r}; expected {', '.join((*GROUPS, *ROWS))}")
    return options


def place_of(options: argparse.Namespace, name: str, seed: int) -> Path:
    words = "".join(
        letter if letter.isalnum() else "_" for letter in name
    )  # of "[D|A]" too, which no tool takes for an option
    return (options.folder or options.out.with_suffix("")) / f"{words}-{seed}"


def job(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """What is measured of the teacher, or of a conversion, which is then taken away unless it is to be kept."""
    folder = place_of(options, name, seed)
    with ExitStack() as stack:
        if options.workers > 1:
            folder.parent.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(folder.with_suffix(".log").open("a", encoding="utf-8"))
            stack.enter_context(redirect_stdout(log))
            stack.enter_context(redirect_stderr(log))
        if name == TEACHER:
            return teacher_row(options)
        row = converted(options, ROWS[name], seed, folder)
        if options.folder is None:
            shutil.rmtree(folder)
        return row


def begin(workers: int, places: "Queue[str]") -> None:
    """In each process, before it has seen a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = places.get()
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def ended(options: argparse.Namespace, jobs: list[tuple[str, int]]) -> Iterator[tuple[str, int, dict[str, Any] | None]]:
    """Each job as it ends, with what it measured; None for one that failed, which is told and goes on another time."""
    spawn = get_context("spawn")
    places: Queue[str] = spawn.Queue()
    for gpu in options.jobs * gpus():
        places.put(gpu)
    with ProcessPoolExecutor(options.workers, spawn, begin, (options.workers, places)) as pool:
        asked = {pool.submit(job, options, *each): each for each in jobs}
        for future in as_completed(asked):
            try:
                yield *asked[future], future.result()
            except (ValueError, RuntimeError, OSError):  # the other rows are worth having
                print(f"{asked[future]}:", file=sys.stderr)
                traceback.print_exc()
                yield *asked[future], None


def main() -> None:
    options = parsed()
    if options.show is not None:
        print(shown(json.loads(options.show.read_text(encoding="utf-8"))))
        return
    for task in COMMONSENSE if options.tasks is not None else ():
        find_file(task, options.tasks)  # now, not when the first conversion is done
    table, failed = opened(options), False
    jobs = [] if TEACHER in table else [(TEACHER, 0)]
    jobs += [(n, seed) for seed in options.seeds for n in options.rows if str(seed) not in table["rows"].get(n, {})]
    for name, seed, row in ended(options, jobs):
        if row is None:
            failed = True
            continue
        if name == TEACHER:
            table[TEACHER] = row
        else:
            table["rows"].setdefault(name, {})[str(seed)] = row
        write_text(options.out, json.dumps(table, indent=1) + "\n")
        print(f"{name}, seed {seed}: perplexity {row['perplexity']:.4f}", flush=True)
    if TEACHER in table:
        print(shown(table))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
