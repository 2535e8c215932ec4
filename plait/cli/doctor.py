"""`plait doctor`: what this machine has, and which form of each op would run here and why."""

import os
import platform
from importlib import import_module, metadata, util
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

import plait
from plait.cli.command import Outcome

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


if TYPE_CHECKING:
    from rich.console import Console


def command(screen: "Console") -> Outcome:
    """Versions, devices, and for each op which form runs here and why the others do not."""
    import torch

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
        "kernels": kernels(),
    }
    report(screen, data)
    return Outcome(data, next=["plait selfcheck"])


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
    from plait.study.demo import expected_minutes, pace
    from plait.train.instructions import cpu_bfloat16

    measured = pace()
    return {
        "name": cpu_name(),
        "cores": cores(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": cpu_bfloat16(),
        "demo_tokens_per_s": measured,
        "demo_minutes": expected_minutes(measured, cores()),
    }


def kernels() -> list[dict[str, str]]:
    """Every form of every op, for one token and for many, in the dtypes that models are run in."""
    import torch

    from plait import ops
    from plait.ops.kernels import Call, explain

    folders = (folder.name for folder in iter_modules(ops.__path__) if folder.ispkg)
    types = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    rows = []
    for op in folders:
        module = import_module(f"plait.ops.{op}")
        for device in types:
            for tokens in (1, 512):
                call = Call(tokens, device, torch.bfloat16 if device == "cuda" else torch.float32)
                for form, reason in explain(module.KERNELS, call):
                    dtype = str(call.dtype).removeprefix("torch.")
                    rows.append(
                        {
                            "op": op,
                            "device": device,
                            "tokens": str(tokens),
                            "dtype": dtype,
                            "form": form,
                            "reason": reason,
                        }
                    )
    return rows


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
        facts.add_row("PLAIT_KERNELS", f"{data['forced']}: forced for every op, whatever the table says")
    screen.print(facts)
    table = Table(*(("op", "device", "tokens", "dtype", "form", "used, or why not")))
    for row in data["kernels"]:
        table.add_row(*row.values(), style="bold" if row["reason"] == "used" else "")
    screen.print(table)
