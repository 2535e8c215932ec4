"""What a study is, as data: several patterns, and everything they share."""

from typing import Any

import msgspec

from plait.design.struct import Struct, convert, positive
from plait.study.match import match_parameters
from plait.train import DataConfig, RunConfig

RESERVED = ("design", "data", "folder", "steps")  # of a run: what the study says itself


class Study(Struct, frozen=True, kw_only=True, tag=False):
    """Several patterns trained and measured under one budget.

    patterns: pattern by name.                      folder: one run's folder by name, results.json and report.html.
    dim: width of every model.                      parameters: how many every model has, within 3 %.
    tokens: of text that every model reads in training, the same in the same order; rounded down to whole steps.
    layers: what letters mean, for all patterns.    data, training: as in a run; `training` holds its other keys.
    decode_contexts: tokens of context at which decoding is timed.
    state_contexts: tokens of context at which the state is counted.
    jobs: runs that are trained at a time.          threads: CPU threads of each, and of what is measured after.
    sample_prompt: what every model's sample continues, for `sample_tokens` tokens at `sample_temperature`.
    """

    patterns: dict[str, str]
    folder: str
    dim: int
    parameters: int
    tokens: int
    layers: dict[str, Any] = {}
    data: Any = DataConfig()
    training: dict[str, Any] = {}
    decode_contexts: tuple[int, ...] = (256, 1_024, 4_096, 8_192)
    state_contexts: tuple[int, ...] = (1_024, 4_096, 16_384, 65_536, 131_072)
    jobs: int = 1
    threads: int = 1
    sample_prompt: str = "def "
    sample_tokens: int = 96
    sample_temperature: float = 0.7

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "data", convert(self.data, DataConfig, "data"))
        positive(self, "dim", "parameters", "tokens", "sample_tokens", "jobs", "threads")
        if not self.sample_prompt:
            raise ValueError("study: sample_prompt is empty; expected text to go on from")
        if not 0 <= self.sample_temperature <= 1_000:
            raise ValueError(f"study: sample_temperature must be from 0 to 1,000, got {self.sample_temperature}")
        for name in ("decode_contexts", "state_contexts"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"study: {name} must be numbers of tokens from 1 on, got {list(getattr(self, name))}")
        if not self.patterns:
            raise ValueError("study: no patterns; expected at least one, as in {'transformer': '(AF)4'}")
        for key in RESERVED:
            if key in self.training:
                raise ValueError(f"study: training.{key} is what the study sets for each run; leave it out")

    def run(self, name: str, vocab: int) -> RunConfig:
        """The training run of one pattern. Raises ValueError where it cannot be made as large as the others."""
        design = match_parameters(self.patterns[name], self.parameters, vocab=vocab, dim=self.dim, layers=self.layers)
        run = RunConfig(design=design, data=self.data, folder=f"{self.folder}/{name}", **self.training)
        steps = self.tokens // (run.batch * run.data.length)
        if steps < 1:
            raise ValueError(f"study: {self.tokens} tokens are less than one step of {run.batch * run.data.length}")
        return run.replace(steps=steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every key spelled out."""
        return msgspec.to_builtins(msgspec.structs.asdict(self) | {"data": msgspec.structs.asdict(self.data)})
