"""Law 11, decoding: however far it goes, torch.compile has seen all of it with the second token."""

from typing import Any

import torch
from torch._dynamo.backends.registry import lookup_backend

from plait.evaluate.laws.compare import LawBroken, agree
from plait.model import LanguageModel

TOKENS = 12


@torch.no_grad()
def decoding(law: str, model: LanguageModel, tokens: torch.Tensor, backend: str) -> float:
    """From a state without room, and one with: token by token, no graph after the second."""
    worst, compiler, graphs = 0.0, lookup_backend(backend), [0]

    def counting(*args: Any, **options: Any) -> Any:
        graphs[0] += 1
        return compiler(*args, **options)

    want, _ = model(tokens[:, :TOKENS])
    for room in (0, 32):
        torch.compiler.reset()
        known = 0
        step, state, logits = torch.compile(model, fullgraph=True, backend=counting), model.init_state(1, room), []
        for i in range(TOKENS):
            y, state = step(tokens[:, i : i + 1], state)
            logits.append(y)
            known = graphs[0] if i < 2 else known
            if graphs[0] > known:
                raise LawBroken(law, f"token {i + 1} of a decoding was compiled anew, with room for {room} tokens")
        got = torch.cat(logits, 1)
        worst = max(worst, agree(law, f"decoding with room for {room}", {"": got}, {"": want}))
    return worst
