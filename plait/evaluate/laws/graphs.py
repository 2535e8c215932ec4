"""Law 11: however far a decoding goes, torch.compile has seen all of it with the second token; and packed documents of any
number and lengths are one graph."""

from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from plait.evaluate.laws.compare import AUTOCAST, LawBroken, Values, agree, outcome, with_gradients
from plait.model import LanguageModel

TOKENS = 12
DOCUMENTS = ((0, 66, 70), (0, 1, 5, 9, 70), (0, 70), (0, *range(6, 71)))  # 70 tokens, in one document and in many


class Counting:
    """A compiler that counts its graphs."""

    def __init__(self, backend: str):
        self.compiler, self.graphs = lookup_backend(backend), 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.graphs += 1
        return self.compiler(*args, **options)


@torch.no_grad()
def decoding(law: str, model: LanguageModel, tokens: torch.Tensor, backend: str, room: int = 0) -> float:
    """From the first token on, token by token: no graph after the second, whatever `room` the state has at first. A call that
    is not compiled goes on from what such calls leave."""
    torch.compiler.reset()
    counting, known = Counting(backend), 0
    step, state, logits = torch.compile(model, fullgraph=True, backend=counting), model.init_state(1, room), []
    for i in range(TOKENS):
        y, state = step(tokens[:, i : i + 1], state)
        logits.append(y)
        known = counting.graphs if i < 2 else known
        if counting.graphs > known:
            raise LawBroken(law, f"token {i + 1} of a decoding was compiled anew")
    logits.append(model(tokens[:, TOKENS : TOKENS + 5], state)[0])
    want, _ = model(tokens[:, : TOKENS + 5])
    return agree(law, "decoding", {"": torch.cat(logits, 1)}, {"": want})


def packing(law: str, model: LanguageModel, tokens: Tensor, backend: str) -> float:
    """Training on packed documents, under autocast too, by one function: outputs and gradients are those without a compiler."""
    torch.compiler.reset()
    counting, worst = Counting(backend), 0.0
    whole = torch.compile(model, fullgraph=True, backend=counting)

    def run(form: Any, cuts: tuple[int, ...], narrow: bool) -> Values:
        offsets = torch.tensor(cuts, dtype=torch.int32, device="cpu")
        torch._dynamo.maybe_mark_dynamic(offsets, 0)  # as torch would itself with the second number of documents
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=narrow):
            logits, _ = form(tokens, cu_seqlens=offsets)
        return outcome(list(logits.float() if narrow else logits), None)

    for narrow in (False, True):
        for cuts in DOCUMENTS:
            got = with_gradients(model, lambda cuts=cuts, narrow=narrow: run(whole, cuts, narrow))
            want = with_gradients(model, lambda cuts=cuts, narrow=narrow: run(model, cuts, narrow))
            what = f"{len(cuts) - 1} packed documents{', under autocast' if narrow else ''}"
            error = agree(law, what, got, want, tolerances=AUTOCAST if narrow else None)
            worst = worst if narrow else max(worst, error)
            if counting.graphs > 1 + narrow:
                raise LawBroken(law, f"{what} were compiled anew")
    with torch.no_grad():  # as in the evaluation of what is trained so
        got, want = (run(form, DOCUMENTS[1], False) for form in (whole, model))
    return max(worst, agree(law, "packed documents without gradients", got, want))
