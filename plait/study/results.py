"""What a study found: numbers per model, and on what machine they were measured."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plait.files import json_text, write_text

RESULTS = "results.json"


@dataclass(frozen=True, slots=True)
class ModelResult:
    """One model. decode_ms: milliseconds a token by tokens of context; state_bytes: by tokens of context, batch 1.

    losses: (tokens read, loss of that step in nats a token); heldout: (tokens read, held-out loss in nats a token).
    """

    name: str
    pattern: str
    folder: str
    parameters: int
    bits_per_byte: float
    train_tokens: int
    train_seconds: float
    decode_ms: dict[int, float]
    state_bytes: dict[int, int]
    losses: list[tuple[int, float]]
    heldout: list[tuple[int, float]]
    prompt: str
    sample: str

    @property
    def train_tokens_per_s(self) -> float:
        return self.train_tokens / self.train_seconds


def as_data(study: dict[str, Any], models: list[ModelResult], facts: dict[str, Any]) -> dict[str, Any]:
    """All of it as plain data: what results.json holds and the report is drawn from."""
    rows = [asdict(model) | {"train_tokens_per_s": model.train_tokens_per_s} for model in models]
    return json.loads(json_text({"study": study, "models": rows, **facts}))


def write_results(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / RESULTS
    write_text(path, json_text(data, indent=1) + "\n")
    return path
