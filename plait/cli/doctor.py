"""`plait doctor`: what this machine has, and which form of each op would run here, or in a design, and why."""

import os
import platform
from importlib import metadata, util
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import typer

import plait
from plait.cli.changes import changed_design
from plait.cli.command import Outcome, shell
from plait.design import ModelConfig
from plait.design.layers import LETTERS, Layer
from plait.design.places import layers

PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "msgspec",
    "typer",
    "rich",
    "jinja2",
    "matplotlib",
)
OPTIONAL = {
    "datasets": "hf: sources",
    "pyarrow": "parquet sources",
    "triton": "torch.compile on CUDA",
}


WIDTH = 768  # of the model whose layers the letters are, where no design is given

# what a model does, as a `plait.ops.kernels.Call` sees it
CALLS: dict[str, dict[str, Any]] = {
    "decoding": {"tokens": "one", "pooled": True},
    "drafts": {"tokens": "few", "pooled": True},
    "prompts": {"tokens": "many", "pooled": True},
    "training": {"tokens": "many", "gradients": True},
    "packed training": {"tokens": "many", "gradients": True, "packed": True},
}

# an op, the sizes that its forms ask about, and when it is called
Use = tuple[str, Any, tuple[str, ...]]

if TYPE_CHECKING:
    from rich.console import Console


def command(
    screen: "Console",
    spec: Annotated[
        str | None,
        typer.Argument(help="A preset, a pattern, a YAML or JSON file, or a model's folder: its ops, and no more."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the design: dim=768 layers.A.heads=4"),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where the design is to run: auto, cpu, cuda.")] = "auto",
) -> Outcome:
    """Versions, devices, and for each op, or each of a design, which form runs and why the others do not."""
    if spec is not None:
        return of_design(screen, spec, changes or [], device)
    import torch

    types = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    data = {
        "plait": plait.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "optional": {name: _version(name) for name in OPTIONAL},
        "devices": devices(),
        "processor": processor(),
        "forced": os.environ.get("PLAIT_KERNELS"),
        "kernels": [],
    }
    report(screen, data)
    for name in types:
        rows = kernels([(letter, layer.resolve(WIDTH)) for letter, layer in LETTERS.items()], name)
        data["kernels"] += rows
        screen.print(table(rows))
    return Outcome(data, next=["plait selfcheck"])


def of_design(screen: "Console", spec: str, changes: list[str], device: str) -> Outcome:
    """Every op that a design calls, on one device."""
    from plait.model.device import find_device

    design, place = changed_design(spec, changes), find_device(device)
    rows = kernels([(node.letter, node.layer) for node in layers(design.slots)], str(place))
    screen.print(table(rows))
    graphs = buckets(design, place)
    screen.print(graph_table(graphs))
    data = {"design": design.to_dict(), "hash": design.hash, "device": str(place), "kernels": rows, "graphs": graphs}
    return Outcome(data, next=[shell("plait", "show", spec, *changes)])


def buckets(design: ModelConfig, place: Any) -> list[dict[str, float]]:
    """The batch sizes for which a step of this design is captured on a GPU, each captured now, with random weights."""
    if place.type != "cuda" or design.vocab is None:
        return []
    import torch

    from plait.engine.step import captures
    from plait.model import build

    return captures(build(design, device=place, dtype=torch.bfloat16).eval())


def graph_table(rows: list[dict[str, float]]) -> Any:
    from rich.table import Table

    from plait.design.summary import size

    if not rows:
        return "a step of decoding is run op by op here; on a CUDA device it is captured for 1, 2, 4, ... 256 rows"
    grid = Table(
        "rows up to",
        "captured in",
        "a step takes",
        "memory",
        title="captured steps, after 1 token",
        title_justify="left",
    )
    for row in rows:
        grid.add_row(
            f"{row['rows']:.0f}", f"{row['capture_s']:.2f} s", f"{row['step_ms']:.2f} ms", size(int(row["bytes"]))
        )
    return grid


def _version(name: str) -> str | None:
    if util.find_spec(name) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "found"


def devices() -> list[dict[str, Any]]:
    """The CPU, and every CUDA device with its memory in bytes."""
    import torch

    from plait.evaluate.machine import cpu_name

    rows: list[dict[str, Any]] = [{"device": "cpu", "name": cpu_name(), "memory": None}]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        rows.append({"device": f"cuda:{index}", "name": facts.name, "memory": facts.total_memory})
    return rows


def processor() -> dict[str, Any]:
    """The CPU's instructions as torch uses them, what they make quick, and what that means for the demo, measured now."""
    import torch

    from plait.evaluate.machine import cores, cpu_name
    from plait.ops.instructions import cpu_bfloat16
    from plait.study.demo import expected_minutes, pace

    measured = pace()
    return {
        "name": cpu_name(),
        "cores": cores(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": cpu_bfloat16(),
        "demo_tokens_per_s": measured,
        "demo_minutes": expected_minutes(measured, cores()),
    }


def kernels(asked: list[tuple[str, Layer]], device: str) -> list[dict[str, str]]:
    """Every form of every op that these layers call, and when it is used, or why not, in the dtype that models are run in on
    the device."""
    import torch

    from plait.ops.kernels import Call, explain, kernels_of

    place = torch.device(device)
    cuda = place.type == "cuda"
    dtype, architecture = (torch.bfloat16, torch.cuda.get_device_capability(place)) if cuda else (torch.float32, None)
    calls = {when: Call(place.type, dtype, architecture=architecture, **facts) for when, facts in CALLS.items()}
    rows: list[dict[str, str]] = []
    for (op, sizes, whens), letters in uses(asked, calls).items():
        found: dict[tuple[int, str, str], list[str]] = {}
        for when in whens:
            for i, row in enumerate(explain(kernels_of(op), calls[when]._replace(sizes=sizes))):
                found.setdefault((i, *row), []).append(when)
        rows += [
            {
                "op": op,
                "letters": " ".join(letters),
                "device": device,
                "dtype": str(dtype).removeprefix("torch."),
                "form": form,
                "reason": reason,
                "when": "always" if len(group) == len(calls) else ", ".join(group),
            }
            for (_, form, reason), group in sorted(found.items(), key=lambda row: row[0][0])
        ]
    return rows


def uses(asked: list[tuple[str, Layer]], calls: dict[str, Any]) -> dict[Use, list[str]]:
    """The letters that call each op, and in which of `calls`."""
    from plait.layers.stack import LAYERS

    found: dict[tuple[str, Any, str], list[str]] = {}
    for (letter, layer), (when, call) in product(asked, calls.items()):
        for op, sizes in LAYERS[type(layer)].ops(layer, call):
            whens = found.setdefault((op, sizes, letter), [])
            if when not in whens:
                whens.append(when)
    letters: dict[Use, list[str]] = {}
    for (op, sizes, letter), whens in found.items():
        letters.setdefault((op, sizes, tuple(whens)), []).append(letter)
    return letters


def table(rows: list[dict[str, str]]) -> Any:
    """What `kernels` found on a device."""
    from rich.table import Table

    grid = Table("op", "form", "used, or why not", "when", title_justify="left")
    grid.title = f"{rows[0]['device']}, {rows[0]['dtype']}" if rows else "no layer of this design calls an op"
    before = None
    for row in rows:
        op = f"{row['op']} ({row['letters']})" if row["letters"] else row["op"]
        if op != before:
            grid.add_section()
        style = "bold" if row["reason"].startswith("used") else ""
        grid.add_row("" if op == before else op, row["form"], row["reason"], row["when"], style=style)
        before = op
    return grid


def report(screen: "Console", data: dict[str, Any]) -> None:
    from rich.table import Table

    from plait.design.summary import size

    facts = Table(show_header=False)
    facts.add_row("plait", data["plait"])
    facts.add_row("python", f"{data['python']} on {data['platform']}")
    facts.add_row("packages", ", ".join(f"{name} {version}" for name, version in data["packages"].items()))
    for name, version in data["optional"].items():
        facts.add_row(name, f"{version or 'not installed'} ({OPTIONAL[name]})")
    for device in data["devices"]:
        memory = (
            f", {size(device['memory'])}" if device["memory"] else f", {data['cores']} cores, {data['threads']} threads"
        )
        facts.add_row(device["device"], f"{device['name']}{memory}")
    cpu = data["processor"]
    quick = (
        f"bfloat16 products by {cpu['bfloat16']}: precision bfloat16 and Muon in bfloat16 are quick"
        if cpu["bfloat16"]
        else "no bfloat16 products: float32 is quick, precision bfloat16 is not; Muon runs in float32"
    )
    facts.add_row("cpu instructions", f"{cpu['instructions']}, {quick}")
    facts.add_row(
        "plait demo",
        f"{cpu['demo_tokens_per_s']:,.0f} tokens/s in training on one thread (three steps of (DF)3 AF, just now): about "
        f"{cpu['demo_minutes']:.1f} minutes of training, then measuring",
    )
    if data["forced"]:
        facts.add_row("PLAIT_KERNELS", data["forced"])
    screen.print(facts)
