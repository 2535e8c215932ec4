"""Milliseconds a token after contexts of different lengths, and what is remembered of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from plait.design.count import state_bytes
from plait.evaluate.clock import now
from plait.model import LanguageModel
from plait.state import ModelState

CHUNK = 1024  # tokens in one call while reading a context
WARM_UP = 3  # first calls allocate and choose kernels


@dataclass(frozen=True, slots=True)
class Speed:
    """What one more token costs after `context` tokens, and what reading those took. `state_bytes`: of one sequence."""

    context: int
    decode_ms: float
    prefill_ms: float
    state_bytes: int


@torch.inference_mode()
def speeds(
    model: LanguageModel, contexts: Sequence[int], *, tokens: int = 32, batch: int = 1, chunk: int = CHUNK
) -> list[Speed]:
    """A `Speed` for each context, shortest first. Each is read once, `chunk` tokens a call, on from the one before.

    The text is random ids: time does not depend on what they say.
    """
    if not contexts or min(contexts) < 1 or tokens < 1 or batch < 1 or chunk < 1:
        raise ValueError(
            f"contexts, tokens, batch and chunk must be at least 1, got {list(contexts)}, {tokens}, {batch} and {chunk}"
        )
    ordered = sorted(contexts)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(model.design.vocab, (batch, ordered[-1]), generator=generator).to(model.device)
    state = model.init_state(batch, ordered[-1] + tokens + WARM_UP)
    dtype = str(model.dtype).removeprefix("torch.")
    results, seen, spent = [], 0, 0.0
    for context in ordered:
        started = now(model.device)
        for part in text[:, seen:context].split(chunk, 1):
            if part.shape[1]:
                _, after = model.features(part, state)
                assert after is not None  # one was given
                state = after
        spent += now(model.device) - started
        seen = context
        time = _decode(model, state, text[:, context - 1 : context], tokens)
        results.append(Speed(context, 1e3 * time, 1e3 * spent, state_bytes(model.design, context, dtype)))
    return results


def _decode(model: LanguageModel, state: ModelState, token: Tensor, tokens: int) -> float:
    """Median seconds a call. The state given stays valid: what is decoded here is overwritten by whoever goes on."""
    times = []
    for _ in range(WARM_UP + tokens):
        started = now(model.device)
        logits, after = model(token, state)
        token = logits.argmax(-1)
        times.append(now(model.device) - started)
        assert after is not None  # one was given
        state = after
    return median(times[WARM_UP:])
