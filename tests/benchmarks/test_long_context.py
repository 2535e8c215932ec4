"""The long-context benchmark on a CPU: rows are kept, stop where they must, and are drawn."""

import json
import sys
from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as patch:  # as Python does for a script in that folder
    patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import long_context


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script with these options; gives its rows by design and context."""
    out = tmp_path / "out.json"

    def main(*options):
        monkeypatch.setattr(sys, "argv", ["long_context.py", "--device", "cpu", "--out", str(out), *map(str, options)])
        long_context.main()
        results = json.loads(out.read_text(encoding="utf-8"))["results"]
        assert len({(row["pattern"], row["context"]) for row in results}) == len(results)
        return {(row["pattern"], row["context"]): row for row in results}

    return main


def test_rows_are_kept_and_stop(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(long_context, "at_once", lambda device: 32)
    monkeypatch.setattr(long_context, "ASKED", 1)
    options = "--designs", "D", "[D|A]", "--contexts", 64, 128
    first = run(*options)
    assert len(first) == 4
    assert all(
        row["prefill_tokens_per_s"] > 0 and row["decode_ms"] > 0 and row["peak_bytes"] > 0 for row in first.values()
    )
    assert first["D", 64]["state_bytes"] == first["D", 128]["state_bytes"]
    assert first["[D|A]", 64]["state_bytes"] < first["[D|A]", 128]["state_bytes"]

    figure = tmp_path / "figures" / "figure.png"
    again = run(*options, 256, 512, "--limit", 0, "--figure", figure)
    assert {key: again[key] for key in first} == first
    assert "0 s were over after 32 tokens" in again["D", 256]["stopped"]
    assert again["D", 512]["stopped"] == "not tried after 256 tokens"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "| `[D\\|A]` |" in capsys.readouterr().out

    assert run(*options, 256, "--limit", 0)["D", 256] == again["D", 256]
    assert "decode_ms" in run(*options, 256, "--limit", 60)["D", 256]


def test_what_no_device_holds_is_not_tried(run, monkeypatch):
    monkeypatch.setattr(long_context, "memory", lambda device: 2**18)
    monkeypatch.setattr(long_context, "WARM_UP", 1)
    check, asked = long_context.check_room, []
    monkeypatch.setattr(
        long_context, "check_room", lambda *given: asked.append(given) or len(asked) < 2 or check(*given)
    )
    found = run("--designs", "A", "--contexts", 1024, 2048)
    assert found["A", 1024]["stopped"].startswith("memory: ")
    assert found["A", 2048]["stopped"] == "not tried after 1,024 tokens"
