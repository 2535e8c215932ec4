"""What the numbers were measured on. Importing this loads no torch."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
NAMES = ("model name", "cpu model", "cpu", "Model", "Hardware")  # what kernels call it: x86, MIPS, POWER, ARM boards
PACKAGES = ("plait", "torch", "numpy", "transformers", "tokenizers")


def machine() -> dict[str, Any]:
    """The processor and what runs on it, as plain data. `instructions`: the widest that torch uses, such as AVX2."""
    import torch

    return {
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"


def cpu_name() -> str:
    """The processor's name, such as "AMD EPYC 9B14"; its architecture where the system has no name for it.

    `platform.processor()` is empty on most Linux systems, and "arm" on a Mac.
    """
    return _named_by_linux() or _named_by_macos() or platform.processor() or platform.machine() or "unknown"


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def described(machine: dict[str, Any]) -> str:
    """The processor of `machine()` in a few words, to stand beside numbers."""
    cores = machine["cores"]
    return f"{machine['cpu']} ({machine['instructions']}), {cores} core{'s' if cores != 1 else ''}"


def _named_by_linux() -> str:
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return next((facts[name] for name in NAMES if facts.get(name)), "")


def _named_by_macos() -> str:
    if sys.platform != "darwin":
        return ""
    asked = subprocess.run(
        ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, encoding="utf-8", check=False
    )
    return asked.stdout.strip()
