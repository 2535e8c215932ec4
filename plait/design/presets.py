"""Ready designs as plain data; sizes count every parameter at the vocabulary given here."""

import json
from pathlib import Path
from typing import Any

# published models and systems, made and counted by benchmarks/published.py
PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("published.json").read_text(encoding="utf-8")
)

OWN: dict[str, dict[str, Any]] = {
    # runs on anything: two megabytes of weights over bytes
    "tiny": {"vocab": 257, "dim": 128, "pattern": "DF AF DF AF"},
    # about 60M parameters at a 32k vocabulary, one per family
    "small-transformer": {"vocab": 32_000, "dim": 512, "pattern": "(AF)12"},
    "small-mamba": {"vocab": 32_000, "dim": 512, "pattern": "(MF)10"},
    "small-hybrid": {
        "vocab": 32_000,
        "dim": 512,
        "pattern": "((DF)3 AF)3",
        "layers": {"A": {"kind": "attention", "qk_norm": True, "output_gate": True, "rope": {"fraction": 0.25}}},
    },
    "small-parallel": {"vocab": 32_000, "dim": 512, "pattern": "([M|A]F)8"},
}

PRESETS = OWN | PUBLISHED
