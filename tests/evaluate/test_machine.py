import platform
import subprocess
import sys

import pytest

from plait.evaluate import machine

X86 = "processor\t: 0\nvendor_id\t: Somebody\ncpu family\t: 6\nmodel\t\t: 106\nmodel name\t: Some CPU @ 2.00GHz\n"
POWER = "processor\t: 0\ncpu\t\t: POWER9, altivec supported\nclock\t\t: 2300MHz\n"
BOARD = "processor\t: 0\nBogoMIPS\t: 108.00\nCPU implementer\t: 0x41\n\nModel\t\t: Raspberry Pi 4 Model B\n"
NAMELESS = "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nmodel name\t:\n"


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (X86, "Some CPU @ 2.00GHz"),
        (X86.replace("\n", "\r\n"), "Some CPU @ 2.00GHz"),
        (POWER, "POWER9, altivec supported"),
        (BOARD, "Raspberry Pi 4 Model B"),
        (NAMELESS, "an architecture"),
        ("", "an architecture"),
        (None, "an architecture"),
    ],
)
def test_a_processor_has_a_name(cpuinfo, name, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo, encoding="utf-8")
    monkeypatch.setattr(machine, "CPUINFO", file)
    monkeypatch.setattr(machine, "_named_by_macos", lambda: "")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "an architecture")
    assert machine.cpu_name() == name


def test_a_mac_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(sys, "platform", "darwin")
    said = subprocess.CompletedProcess([], 0, stdout="Some M9\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: said)
    assert machine.cpu_name() == "Some M9"


def test_facts_are_plain_data_and_described_in_a_line():
    facts = machine.machine()
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert machine.described(facts).startswith(facts["cpu"])
