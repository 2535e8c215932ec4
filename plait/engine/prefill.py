"""Reading prompts: from rows of token ids to one state and the last position's logits, in bounded memory."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from plait.model.language_model import LanguageModel
from plait.state import ModelState

CHUNK = 2048  # tokens in one call
ON_GPU = 4  # times as many: there a call costs the host more than the tokens cost the device


def at_once(device: torch.device) -> int:
    """Tokens in one call."""
    return CHUNK * ON_GPU if device.type == "cuda" else CHUNK


def prefill(
    model: LanguageModel, prompts: Sequence[Sequence[int]], room: int
) -> tuple[Float[Tensor, "b d"], ModelState]:
    """What the model's head reads for the token after each prompt, and the state, with room for `room` more keys a row.

    Short prompts share a call, packed end to end; a long one has calls of its own.
    """
    hidden, states = [], []
    for group in _groups([len(prompt) for prompt in prompts], at_once(model.device)):
        rows = [prompts[row] for row in group]
        state = model.init_state(len(rows), max(map(len, rows)) + room)
        last, state = read_one(model, rows[0], state) if len(rows) == 1 else _read_packed(model, rows, state)
        hidden.append(last)
        states.append(state)
    return torch.cat(hidden), ModelState.join(states)


def _groups(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Consecutive rows of together at most `most` tokens; longer rows alone."""
    groups: list[list[int]] = []
    used = most
    for row, length in enumerate(lengths):
        if used + length > most:
            groups.append([])
            used = 0
        groups[-1].append(row)
        used += length
    return groups


def read_one(model: LanguageModel, prompt: Sequence[int], state: ModelState) -> tuple[Float[Tensor, "1 d"], ModelState]:
    """As `prefill`, of one row that goes on from `state`."""
    tokens = torch.tensor([prompt], device=model.device)
    for chunk in tokens.split(at_once(model.device), 1):
        hidden, state = advance(model, chunk, state)
    return hidden[:, -1], state


def _read_packed(
    model: LanguageModel, prompts: Sequence[Sequence[int]], state: ModelState
) -> tuple[Tensor, ModelState]:
    lengths = [len(prompt) for prompt in prompts]
    if len(set(lengths)) == 1:
        hidden, state = advance(model, torch.tensor(prompts, device=model.device), state)
        return hidden[:, -1], state
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
    tokens = torch.tensor([[token for prompt in prompts for token in prompt]], device=model.device)
    hidden, state = advance(model, tokens, state, offsets)
    return hidden[0, (offsets[1:] - 1).to(model.device)], state


def advance(
    model: LanguageModel, tokens: Tensor, state: ModelState, cu_seqlens: Tensor | None = None
) -> tuple[Float[Tensor, "b t d"], ModelState]:
    """The model's features, and the state, which is given and so is returned."""
    hidden, after = model.features(tokens, state, cu_seqlens=cu_seqlens)
    assert after is not None
    return hidden, after
