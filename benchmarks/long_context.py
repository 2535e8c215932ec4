"""Long contexts: prompts read in chunks as `plait generate` reads them, then steps of one token at that context.

    python benchmarks/long_context.py --out benchmarks/results/long_context_h100.json [--figure docs/images/long_context.png]
    python benchmarks/long_context.py --device cpu --out /tmp/long_context.json

Five designs of about 350M parameters (width 1,024, vocabulary 32,000, bfloat16, one sequence) at 1,024 to 1,048,576 tokens; on
a CPU tiny ones, at few. Of each design and context: tokens a second of the whole prompt, milliseconds of a step (the median),
and the most memory that was held, weights included: while the prompt was read, and with the pool that decoding copies its state
to.

A row stops, and says so, where memory ends or reading takes longer than `--limit` seconds; a design's longer contexts are then
not tried. Rows are written as they are done: those that --out has already are not run again, unless a longer limit would get
further.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import plait
from plait.design.count import parameters, state_bytes
from plait.engine.decode import evaluating
from plait.engine.prefill import advance, at_once
from plait.evaluate.clock import intervals, now
from plait.evaluate.decoding import name_of, stepping
from plait.evaluate.machine import machine
from plait.evaluate.room import no_memory, release
from plait.evaluate.training import peak_memory
from plait.files import write_text
from plait.model.device import find_device, memory
from plait.state import ModelState

DESIGNS = ("(AF)24", "((DF)3 AF)6", "([M|A]F)18", "((DF)3 WF)6", "(DF)24")
TINY = ("(AF)2", "(DF)3 AF", "([M|A]F)2", "(DF)3 WF", "(DF)2")
WARM_UP, STEPS = 4, 48  # the first step is captured on a GPU
ASKED = 16  # chunks after which the clock is looked at: the device is waited for then


@dataclass(frozen=True)
class Plan:
    """What a kind of device is given."""

    designs: tuple[str, ...]
    contexts: tuple[int, ...]
    dim: int
    vocab: int
    dtype: torch.dtype


PLANS = {
    "cuda": Plan(DESIGNS, tuple(1024 * 4**i for i in range(6)), 1024, 32_000, torch.bfloat16),
    "cpu": Plan(TINY, (1024, 4096, 8192), 64, 256, torch.float32),
}


class Stopped(Exception):
    """Why a row has no numbers."""


def read(model: plait.LanguageModel, tokens: Tensor, limit: float) -> tuple[ModelState, float]:
    """What the model remembers of tokens (1, t), and the seconds that it took. Raises Stopped after `limit` seconds."""
    state, started = model.init_state(1, tokens.shape[1]), now(model.device)
    for i, chunk in enumerate(tokens.split(at_once(model.device), 1), 1):
        _, state = advance(model, chunk, state)
        if i % ASKED == 0 and (spent := now(model.device) - started) > limit:
            raise Stopped(
                f"{limit:.0f} s were over after {min(i * at_once(model.device), tokens.shape[1]):,} tokens ({spent:.0f} s)"
            )
    return state, now(model.device) - started


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def check_room(model: plait.LanguageModel, context: int) -> None:
    """Raise Stopped where weights and one state alone are more than there is."""
    have, state = memory(model.device), state_bytes(model.design, context, name_of(model.dtype))
    need = state + sum(parameter.nbytes for parameter in model.parameters())
    if have is not None and need > have:
        raise Stopped(f"memory: {need / 2**30:.0f} GiB of weights and state, the device has {have / 2**30:.0f}")


def measure(model: plait.LanguageModel, context: int, limit: float) -> dict[str, Any]:
    """The numbers of a row. Raises Stopped."""
    check_room(model, context)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.design.vocab, (1, context), generator=generator, device="cpu").to(model.device)
    forget_peak(model.device)
    state, spent = read(model, tokens, limit)
    reading = peak_memory(model.device)
    step, at = stepping(model, state, context + WARM_UP + STEPS)
    del state
    times = intervals(lambda: step(at), model.device, WARM_UP + STEPS, waiting=True)[WARM_UP:]
    return {
        "prefill_s": spent,
        "prefill_tokens_per_s": context / spent,
        "decode_ms": 1e3 * median(times),
        "worst_ms": 1e3 * max(times),
        "state_bytes": state_bytes(model.design, context, name_of(model.dtype)),
        "peak_prefill_bytes": reading,
        "peak_bytes": peak_memory(model.device),
    }


def attempted(model: plait.LanguageModel, context: int, limit: float) -> dict[str, Any]:
    """`measure`, or why there is nothing to say."""
    try:
        return measure(model, context, limit)
    except Stopped as stop:
        return {"stopped": str(stop)}
    except (RuntimeError, MemoryError) as error:
        if not no_memory(error):
            raise
        return {"stopped": "memory: it ran out"}


def rows(plan: Plan, device: torch.device, limit: float, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each design and context that is not `known`."""
    for pattern in plan.designs:
        done = {row["context"]: row for row in known if row["pattern"] == pattern}
        left = [context for context in plan.contexts if not settled(done.get(context), limit)]
        if not left:
            continue
        design = plait.ModelConfig(vocab=plan.vocab, dim=plan.dim, pattern=pattern)
        model, stopped = plait.build(design, device=device, dtype=plan.dtype), ""
        with evaluating(model), torch.inference_mode():
            measure(
                model, 2 * at_once(device) + 5, float("inf")
            )  # kernels are compiled: for whole chunks, the rest, and a step
            for context in left:
                release()
                found = {"stopped": f"not tried after {stopped}"} if stopped else attempted(model, context, limit)
                stopped = stopped or (f"{context:,} tokens" if "stopped" in found else "")
                size = {"parameters": parameters(design), "context": context, "limit_s": limit}
                yield {"pattern": pattern, **size, **found}
        del model
        release()


def settled(row: dict[str, Any] | None, limit: float) -> bool:
    """Whether another run would find nothing else."""
    return row is not None and ("stopped" not in row or row["limit_s"] >= limit)


def said(row: dict[str, Any]) -> str:
    head = f"{row['pattern']:14} {row['context']:9,}  "
    if "stopped" in row:
        return head + f"stopped: {row['stopped']}"
    return head + (
        f"{row['prefill_tokens_per_s']:9,.0f} tokens/s  {row['decode_ms']:7.2f} ms a step  "
        f"{row['peak_prefill_bytes'] / 2**30:6.2f} GiB reading, {row['peak_bytes'] / 2**30:6.2f} in all"
    )


def table(results: list[dict[str, Any]]) -> str:
    """For a page: of each design and context tokens/s, ms a step, and GiB."""
    contexts = sorted({row["context"] for row in results})
    lines = [
        "| design | " + " | ".join(f"{context:,}" for context in contexts) + " |",
        "|---" * (len(contexts) + 1) + "|",
    ]
    for pattern in dict.fromkeys(row["pattern"] for row in results):
        here = {row["context"]: row for row in results if row["pattern"] == pattern}
        name = pattern.replace("|", "\\|")
        lines.append(f"| `{name}` | " + " | ".join(cell(here.get(context)) for context in contexts) + " |")
    return "\n".join(lines)


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "stopped" in row:
        return row["stopped"].split(":")[0]
    return f"{row['prefill_tokens_per_s']:,.0f} / {row['decode_ms']:.2f} / {row['peak_bytes'] / 2**30:.1f}"


PANELS = {
    "prefill_tokens_per_s": ("prompt, tokens a second", 1),
    "decode_ms": ("a step, milliseconds", 1),
    "peak_bytes": ("peak memory, GiB", 2**30),
}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Three panels over the context, all axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(PANELS), figsize=(13, 4), layout="constrained")
    for panel, (name, (label, unit)) in zip(panels, PANELS.items(), strict=True):
        for pattern in dict.fromkeys(row["pattern"] for row in results):
            points = [
                (row["context"], row[name] / unit) for row in results if row["pattern"] == pattern and name in row
            ]
            panel.plot(*zip(*sorted(points), strict=True) if points else ((), ()), marker="o", label=pattern)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("context, tokens")
        panel.set_title(label, fontsize=11)
        panel.grid(True, which="both", alpha=0.25)
    panels[0].legend(fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a prompt may take to read")
    parser.add_argument("--designs", nargs="+", help="some of the designs")
    parser.add_argument("--contexts", type=int, nargs="+", help="tokens")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    device = find_device(args.device)
    plan = PLANS["cuda" if device.type == "cuda" else "cpu"]
    plan = Plan(
        tuple(args.designs or plan.designs),
        tuple(sorted(args.contexts or plan.contexts)),
        plan.dim,
        plan.vocab,
        plan.dtype,
    )
    results = json.loads(args.out.read_text(encoding="utf-8"))["results"] if args.out.exists() else []
    about = {"machine": machine(), "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    for row in rows(plan, device, args.limit, list(results)):
        key = row["pattern"], row["context"]
        results = [*(old for old in results if (old["pattern"], old["context"]) != key), row]
        print(said(row), flush=True)
        write_text(args.out, json.dumps(about | {"results": results}, indent=2) + "\n")
    print(table(results))
    if args.figure:
        draw(results, args.figure)


if __name__ == "__main__":
    main()
