"""Made-up results for the report's tests, and text for small studies."""

from pathlib import Path
from typing import Any

import pytest


def fake_model(name: str, pattern: str, index: int) -> dict[str, Any]:
    contexts = (256, 1_024, 8_192)
    return {
        "name": name,
        "pattern": pattern,
        "folder": f"runs/fake/{name}",
        "parameters": 1_000_000 + index,
        "bits_per_byte": 2.0 + index / 10,
        "train_tokens": 64_000,
        "train_seconds": 10.0,
        "train_tokens_per_s": 6_400.0,
        "decode_ms": {str(context): 1.0 + index * context / 1e4 for context in contexts},
        "state_bytes": {str(context): 2**16 + index * context * 4_096 for context in contexts},
        "losses": [[step * 1_000, 6.0 - step / 20] for step in range(1, 65)],
        "heldout": [[32_000, 5.0], [64_000, 4.0]],
        "prompt": "def ",
        "sample": f"sample <b>{name}</b> & more",
    }


@pytest.fixture
def fake_results() -> dict[str, Any]:
    return {
        "study": {
            "parameters": 1_000_000,
            "dim": 128,
            "jobs": 2,
            "threads": 1,
            "data": {"source": "fake text", "length": 256},
            "training": {"optimizer": "muon", "lr": 0.01},
        },
        "models": [fake_model("transformer", "(AF)4", 1), fake_model("parallel", "([D|A]F)4", 0)],
        "command": "plait demo",
        "date": "2026-01-02T03:04:05+00:00",
        "seconds": 60.0,
        "tokenizer": "bpe-1024",
        "text": {"documents": 600, "heldout_documents": 20, "bytes": 10_000_000},
        "machine": {
            "cpu": "A Processor",
            "instructions": "AVX2",
            "cores": 2,
            "threads": 2,
            "platform": "Linux",
            "python": "3.11.7",
            "versions": {"torch": "2.13.0"},
        },
    }


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small documents."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        lines = (f"def f{number}_{line}(x):\n    return x * {line}\n\n" for line in range(20))
        (folder / f"{number}.py").write_text("".join(lines))
    return folder
