"""`plait bench`: how fast a design trains and decodes here, beside what the device can do at most."""

import os
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.changes import changed_design
from plait.cli.command import Outcome, as_command, say, shell
from plait.cli.options import Device
from plait.design.summary import counted, si, size

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from plait.design import ModelConfig
    from plait.evaluate.decoding import DecodeSpeed
    from plait.evaluate.kernels import Kernel
    from plait.evaluate.limits import Limits
    from plait.evaluate.training import TrainSpeed

TOP = 12  # kernels that are shown; all are in the JSON
NAMED = 80  # letters of a kernel's name that are shown
CONTEXTS = (64, 16_384)


class Recompute(StrEnum):
    cheap = "cheap"
    slots = "slots"


app = typer.Typer(help="How fast a design trains and decodes on this machine, and what the device can do at most.")

Design = Annotated[str, typer.Argument(help="A preset, a pattern, a YAML or JSON file, or a model's or run's folder.")]
Changes = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the design: dim=768 layers.A.heads=4"),
]
Precision = Annotated[
    str | None, typer.Option(help="float32 or bfloat16. (default: what the device multiplies matrices fast in)")
]


@app.callback(invoke_without_command=True)
def bench(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def train(
    screen: "Console",
    design: Design,
    changes: Changes = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows in a step.")] = 4,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a row.")] = 4_096,
    precision: Precision = None,
    compile: Annotated[bool, typer.Option("--compile", help="Each kind of slot through torch.compile.")] = False,
    packed: Annotated[
        bool, typer.Option("--packed", help="Documents of random lengths, end to end, instead of whole rows.")
    ] = False,
    recompute: Annotated[
        Recompute | None,
        typer.Option(help="Activations computed again in the backward pass: whole slots, or what is cheap of them."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed, after others that are not.")] = 10,
    device: Device = "auto",
) -> Outcome:
    """Tokens a second in training, model FLOPs used, peak memory, the least that a step could take, and the top kernels."""
    chosen = changed_design(design, changes or [])
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler says on stderr that it starts and stops
    from plait.evaluate.training import train_speed
    from plait.model.device import find_device

    place = find_device(device)
    speed = train_speed(
        chosen,
        batch=batch,
        length=length,
        precision=precision,
        compile=compile,
        packed=packed,
        activation_checkpointing={None: False, "cheap": "cheap", "slots": True}[recompute],
        steps=steps,
        device=str(place),
    )
    about(screen, chosen, place, speed.limits)
    screen.print(train_table(speed, place.type), kernel_table(speed))
    run = {
        "batch": batch,
        "length": length,
        "compile": compile,
        "packed": packed,
        "recompute": recompute,
        "steps": steps,
    }
    return Outcome(
        facts(chosen, place) | run | train_data(speed), next=[shell("plait", "bench", "decode", design, *changes or [])]
    )


def decode(
    screen: "Console",
    design: Design,
    changes: Changes = None,
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens that a sequence has behind it; may be given again. (default: 64 and 16384)"),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequences in a step; may be given again. (default: 1)")
    ] = None,
    precision: Precision = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed, after others that are not.")] = 64,
    device: Device = "auto",
) -> Outcome:
    """Milliseconds a token after contexts of different lengths, and how near that is to reading weights and state once."""
    chosen = changed_design(design, changes or [])
    import torch

    from plait.evaluate.decoding import decode_speeds
    from plait.evaluate.limits import limits
    from plait.evaluate.training import check_tokens, known_precision
    from plait.model import build
    from plait.model.device import find_device

    place = find_device(device)
    check_tokens(chosen)
    dtype = getattr(torch, known_precision(precision, place))
    model = build(chosen, device=place, dtype=dtype)
    can = limits(place, dtype)
    about(screen, chosen, place, can)
    rows = decode_speeds(model, context or CONTEXTS, batch or [1], can, steps=steps)
    screen.print(decode_table(rows))
    data = facts(chosen, place) | {"limits": asdict(can), "steps": steps, "results": [decode_data(row) for row in rows]}
    return Outcome(data, next=[shell("plait", "bench", "train", design, *changes or [])])


for work in (train, decode):
    app.command(work.__name__)(as_command(work))


def facts(design: "ModelConfig", place: "torch.device") -> dict[str, Any]:
    """What was measured, and where."""
    from plait.design.count import parameters
    from plait.evaluate.machine import machine

    return {
        "design": design.to_dict(),
        "hash": design.hash,
        "parameters": parameters(design),
        "device": str(place),
        "device_name": name_of(place),
        "machine": machine(),
    }


def name_of(place: "torch.device") -> str:
    import torch

    from plait.evaluate.machine import cpu_name

    return (
        torch.cuda.get_device_name(place)
        if place.type == "cuda"
        else f"{cpu_name()}, {torch.get_num_threads()} threads"
    )


def about(screen: "Console", design: "ModelConfig", place: "torch.device", can: "Limits") -> None:
    say(screen, f"{design.pattern}: {counted(design)} parameters on {name_of(place)}")
    say(
        screen,
        f"measured just now: {can.dtype} products of {can.side} x {can.side} matrices at {si(can.products)}FLOP/s, copies of "
        f"{size(can.copied)} at {si(can.copies)}B/s, read and written together",
    )


def train_table(speed: "TrainSpeed", device: str) -> Any:
    from rich.table import Table

    grid = Table(show_header=False)
    grid.add_row("tokens/s", f"{speed.tokens_per_s:,.0f}")
    grid.add_row("a step of", f"{speed.tokens:,} tokens, {1e3 * speed.step_s:.4g} ms (median)")
    grid.add_row("the first step", f"{speed.first_s:.3g} s")
    grid.add_row("MFU", f"{speed.mfu:.1%} of {si(speed.flops)}FLOP a step (forward x 3) at the products' rate measured")
    whose = "of tensors" if device == "cuda" else "of this process"
    grid.add_row("peak memory", f"{size(speed.peak_memory)} {whose}" if speed.peak_memory else "unknown here")
    grid.add_row(
        "floor",
        f"{1e3 * speed.floor_s:.4g} ms, the sum of {1e3 * speed.products_s:.4g} ms of products and "
        f"{1e3 * speed.moved_s:.4g} ms for {size(speed.moved)} of weights, gradients and AdamW",
    )
    grid.add_row("step / floor", f"{speed.step_s / speed.floor_s:.2f}")
    return grid


def kernel_table(speed: "TrainSpeed") -> Any:
    from rich.table import Table

    total = sum(kernel.ms for kernel in speed.kernels)
    grid = Table(title=f"top kernels, of {total:.4g} ms a step under the profiler", title_justify="left")
    for name in ("kernel", "ms", "share", "calls"):
        grid.add_column(name, justify="left" if name == "kernel" else "right")
    for kernel in speed.kernels[:TOP]:
        grid.add_row(short(kernel), f"{kernel.ms:.4g}", f"{kernel.share:.1%}", f"{kernel.calls:.4g}")
    return grid


def short(kernel: "Kernel") -> Any:
    from rich.text import Text

    return Text(kernel.name if len(kernel.name) <= NAMED else f"{kernel.name[: NAMED - 1]}…")


def decode_table(rows: list["DecodeSpeed"]) -> Any:
    from rich.table import Table

    captured = all(row.captured for row in rows)
    grid = Table(title="captured steps" if captured else "steps, op by op", title_justify="left")
    for name in (
        "batch",
        "context",
        "ms/token",
        "slowest",
        "floor",
        "tokens/s",
        "read/s",
        "of copies",
        "state",
        "weights",
    ):
        grid.add_column(name, justify="right")
    for row in rows:
        grid.add_row(
            str(row.batch),
            f"{row.context:,}",
            f"{row.ms:.4g}",
            f"{row.worst_ms:.4g}",
            f"{row.floor_ms:.3g}",
            f"{row.tokens_per_s:,.0f}",
            f"{size(row.bandwidth)}",
            f"{row.share:.1%}",
            size(row.state_bytes),
            size(row.weights_bytes),
        )
    return grid


def train_data(speed: "TrainSpeed") -> dict[str, Any]:
    return asdict(speed) | {
        name: getattr(speed, name) for name in ("tokens_per_s", "mfu", "products_s", "moved_s", "floor_s")
    }


def decode_data(row: "DecodeSpeed") -> dict[str, Any]:
    own = {name: value for name, value in asdict(row).items() if name != "limits"}
    return own | {name: getattr(row, name) for name in ("tokens_per_s", "bandwidth", "share", "floor_ms")}
