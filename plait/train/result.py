"""What a finished run hands back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.data import Tokenizer
from plait.model import LanguageModel
from plait.run_folder import METRICS
from plait.train.heldout import HeldOut
from plait.train.metrics import read_metrics


@dataclass(frozen=True, slots=True)
class Result:
    """folder: the run's; checkpoint: its last; heldout: at the last step; tokens: read in training, over all resumes;
    seconds: spent in steps, without evaluation and saving; done: steps of this call, 0 for a run that was finished."""

    folder: Path
    checkpoint: Path
    model: LanguageModel
    tokenizer: Tokenizer | None
    step: int
    tokens: int
    seconds: float
    heldout: HeldOut
    done: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def history(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, all with their step. Of a step: loss (of a position; nats per token), lr, grad_norm,
        tokens, step_s, tokens_per_s, and losses where the loss is a sum of several, by name; of an evaluation: heldout_loss, by
        the same objective, and bits_per_byte where that is the next token of text; of a sample: sample. Designs with recurrent
        layers also have solver in the first two: by layer, mean passes, worst gap, and how many calls fell_back; what other
        layers say of a step is in stats."""
        return read_metrics(self.folder / METRICS)
