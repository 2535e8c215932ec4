"""What docs/performance.md holds plait to on a GPU, in one run: each measurement in a process of its own, alone on its GPU.

    python benchmarks/bars_gpu.py --out bars.json [--only train decode] [--seconds 1500]
    python benchmarks/bars_gpu.py --show bars.json

With several GPUs as many measurements run at a time. What is in the file is not measured again, and the file is written anew
after each, so that a run that was stopped goes on. The table has what was measured, its bar, and of training what its step is
spent on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from statistics import median
from typing import Any

import torch
from gpus import gpus

import plait
from plait.evaluate.clock import seconds
from plait.files import write_text
from plait.model import token_loss

SIZE = ["dim=1024", "vocab=32000"]
HYBRID, MAMBA, PARALLEL, KIMI, GRU, ATTENTION = (
    "((DF)3 AF)6",
    "((MF)3 AF)6",
    "([M|A]F)18",
    "((KF)3 AF)6",
    "((GF)3 AF)6",
    "(AF)24",
)
SHAPES = ((4, 4096), (2, 4096), (3, 4096), (4, 2048), (4, 3000), (1, 777))  # the first is compiled for; then the next
LIMIT = 300  # seconds of one measurement
HERE = Path(__file__).parent
Found = dict[str, list[Any]]


def bench(*words: str) -> list[str]:
    return [sys.executable, "-m", "plait", "bench", *words, *SIZE, "--json"]


def script(name: str, *words: str) -> list[str]:
    return [sys.executable, str(HERE / name), *words]


def training(design: str, *words: str) -> list[str]:
    return bench("train", design, "--compile", *words)


JOBS: dict[str, list[str]] = {
    f"train {HYBRID}": training(HYBRID),
    f"train {HYBRID} packed": training(HYBRID, "--packed"),
    f"train {HYBRID} long": training(HYBRID, "--batch", "1", "--length", "32768"),
    f"train {MAMBA}": training(MAMBA),
    f"train {PARALLEL}": training(PARALLEL),
    f"train {KIMI}": training(KIMI),
    f"train {GRU}": training(GRU),
    f"train {ATTENTION}": training(ATTENTION),
    "first step": bench("train", HYBRID, "--steps", "3"),  # with a compiler's cache that is empty
    "stalls": script("bars_gpu.py", "--stalls"),
    f"decode {HYBRID}": script("decode.py", "--patterns", HYBRID, "--out", "{out}"),
    f"decode {MAMBA}": script("decode.py", "--patterns", MAMBA, "--out", "{out}"),
    f"decode {GRU}": script("decode.py", "--patterns", GRU, "--out", "{out}"),
    f"decode {ATTENTION}": script("decode.py", "--patterns", ATTENTION, "--out", "{out}"),
    "op delta": script("ops_gpu.py", "times", "delta"),
    "op ssd": script("ops_gpu.py", "times", "ssd"),
}


@dataclass(frozen=True)
class Bar:
    """What `read` finds among the results is to be at least `bar`, or at most where `most`."""

    name: str
    bar: float
    read: Callable[[Found], float]
    most: bool = False


def rate(job: str, found: Found) -> float:
    (row,) = found[job]
    return row["tokens"] / row["step_s"]


def memory(found: Found) -> float:
    (row,) = found[f"train {HYBRID}"]
    return row["peak_memory"] / 2**30


def decoded(design: str, rows: int, context: int, found: Found) -> float:
    """Tokens a second of all rows together; `context` 0: of streams, reading included."""
    results = [row for row in found[f"decode {design}"][-1]["results"] if row["pattern"] == design]
    if not context:
        return next(row["tokens_s"] for row in results if "tokens_s" in row)
    return next(1e3 * rows / row["ms"] for row in results if (row["rows"], row.get("context")) == (rows, context))


def op(name: str, key: str, found: Found) -> float:
    return next(row[key] for row in found[f"op {name}"] if row["form"] == "chunks")


BARS = [
    *(
        Bar(f"train {design}, tokens/s", bar, partial(rate, f"train {design}"))
        for design, bar in {
            HYBRID: 150e3, MAMBA: 150e3, PARALLEL: 130e3, KIMI: 130e3, GRU: 150e3, ATTENTION: 155e3, f"{HYBRID} long": 110e3
        }.items()
    ),
    Bar(f"train {HYBRID}, GiB", 20, memory, most=True),
    Bar(
        f"train {HYBRID}, packed over unpacked",
        0.93,
        lambda found: rate(f"train {HYBRID} packed", found) / rate(f"train {HYBRID}", found),
    ),
    *(
        Bar(f"decode {design}, {what}, tokens/s", bar, partial(decoded, design, rows, context))
        for design in (HYBRID, MAMBA, GRU)
        for what, rows, context, bar in (
            ("1 row at 64", 1, 64, 1000),
            ("1 row at 16,384", 1, 16_384, 900),
            ("32 rows at 64", 32, 64, 22_000),
            ("100 streams", 100, 0, 25_000),
        )
    ),
    *(
        Bar(f"{name}, {what}, ms", bar, partial(op, name, key), most=True)
        for name, key, what, bar in (
            ("delta", "forward_ms", "forward", 0.5),
            ("delta", "both_ms", "forward and backward", 2.2),
            ("ssd", "forward_ms", "forward", 0.45),
            ("ssd", "both_ms", "forward and backward", 1.9),
        )
    ),
    Bar("first step, cold, s", 30, lambda found: found["first step"][0]["first_s"], most=True),
    Bar("longest stall at a new batch or length, s", 0.5, lambda found: found["stalls"][0]["worst_s"], most=True),
]  # fmt: skip


def stalls() -> None:
    """By how much the first step at a new shape is longer than the steps after it."""
    model = plait.build(plait.ModelConfig(vocab=32_000, dim=1024, pattern=HYBRID), device="cuda")

    def step(batch: int, length: int) -> float:
        tokens = torch.randint(32_000, (batch, length + 1), device="cuda")

        def run() -> None:
            with torch.autocast("cuda", torch.bfloat16):
                token_loss(model, tokens[:, :-1], tokens[:, 1:])[0].backward()
            model.zero_grad()

        first, *others = (seconds(run, model.device, 1)[0] for _ in range(4))
        return first - median(others)

    rows = [{"batch": b, "length": t, "stall_s": step(b, t)} for b, t in SHAPES]
    print(json.dumps({"rows": rows, "worst_s": max(row["stall_s"] for row in rows[1:])}))


def measured(name: str, free: "Queue[str]") -> tuple[list[Any], str | None]:
    """The JSON objects that a measurement printed or wrote, and why it ended where it failed."""
    gpu = free.get()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        env = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        if name == "first step":
            env |= {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        command = [str(out) if word == "{out}" else word for word in JOBS[name]]
        try:
            done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", timeout=LIMIT)
            why = done.stderr.strip().splitlines()[-1:] or [f"ended with {done.returncode}"] if done.returncode else []
            printed = done.stdout
        except subprocess.TimeoutExpired as late:
            why, printed = [f"took longer than {LIMIT} s"], (late.stdout or b"").decode(errors="replace")
        finally:
            free.put(gpu)
        rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        if out.is_file():
            rows.append(json.loads(out.read_text(encoding="utf-8")))
        return rows, why[0] if why else None


def shown(table: dict[str, Any]) -> str:
    found, lines = table["found"], ["| | measured | bar | |", "|---|---|---|---|"]
    for bar in BARS:
        name = bar.name.replace("|", "\\|")
        try:
            value = bar.read(found)
        except (KeyError, IndexError, ValueError, StopIteration):  # not measured, or not to its end
            lines.append(f"| {name} | | {bar.bar:,g} | not measured |")
            continue
        met = value <= bar.bar if bar.most else value >= bar.bar
        number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        lines.append(f"| {name} | {number} | {bar.bar:,g} | {'met' if met else 'missed'} |")
    for job, rows in found.items():
        for row in rows:
            if "kernels" in row and job.startswith("train"):
                top = ", ".join(f"{kernel['name'][:40]} {kernel['share']:.0%}" for kernel in row["kernels"][:5])
                lines.append(f"\n{job}: {1e3 * row['step_s']:.1f} ms; {top}")
    lines += [f"\n{job}: {why}" for job, why in table["failed"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="measurements whose names begin so")
    parser.add_argument("--seconds", type=float, default=3600.0, help="after which none is begun")
    parser.add_argument("--out", type=Path, default=Path("bars.json"))
    parser.add_argument("--show", type=Path, help="print the table of a JSON file, and no more")
    parser.add_argument("--stalls", action="store_true", help="one of the measurements")
    options, started = parser.parse_args(), time.monotonic()
    if options.stalls:
        return stalls()
    if options.show is not None:
        return print(shown(json.loads(options.show.read_text(encoding="utf-8"))))
    table: dict[str, Any] = {"found": {}, "failed": {}, "seconds": {}}
    if options.out.is_file():
        table = json.loads(options.out.read_text(encoding="utf-8"))
    free: Queue[str] = Queue()
    for gpu in gpus():
        free.put(gpu)
    jobs = [job for job in JOBS if job not in table["found"] and job.startswith(tuple(options.only))]

    def run(job: str) -> tuple[list[Any], str | None, float] | None:
        begun = time.monotonic()
        return None if begun - started > options.seconds else (*measured(job, free), time.monotonic() - begun)

    with ThreadPoolExecutor(free.qsize()) as pool:
        asked = {pool.submit(run, job): job for job in jobs}
        for future in as_completed(asked):
            job, ended = asked[future], future.result()
            if ended is None:
                continue
            rows, why, table["seconds"][job] = ended
            if rows:
                table["found"][job] = rows
            table["failed"].pop(job, None)
            if why is not None:
                table["failed"][job] = why
            write_text(options.out, json.dumps(table, indent=1) + "\n")
            print(f"{job}: {table['seconds'][job]:.0f} s{'' if why is None else f', {why}'}", flush=True)
    print(shown(table))
    return None


if __name__ == "__main__":
    main()
