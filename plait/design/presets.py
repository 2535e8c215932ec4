"""Ready designs as plain data; sizes count every parameter at the vocabulary given here."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
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
