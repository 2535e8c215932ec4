"""Laws 1 to 5: one model, many ways to call it, one answer."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from plait.design.model import ModelConfig
from plait.evaluate.laws.compare import (
    LawBroken,
    Values,
    agree,
    another,
    leaves,
    outcome,
    some_tokens,
    subject,
    with_gradients,
)
from plait.layers.elementwise import ElementwiseLayer
from plait.layers.gated_deltanet import GatedDeltaNetLayer
from plait.layers.mamba import MambaLayer
from plait.layers.mamba2 import Mamba2Layer
from plait.layers.mlstm import MLSTMLayer
from plait.layers.recurrent import RecurrentCell
from plait.layers.rg_lru import RGLRULayer
from plait.layers.scalar_decay import SimpleGLALayer
from plait.model import LanguageModel
from plait.ops.kernels import forced
from plait.state import ModelState

LENGTHS = (1, 2, 63, 64, 65, 257)  # around a chunk; a prime, which is more than one block of anything
DOCUMENTS = (1, 66, 2, 5, 64, 1)


def causal(design: ModelConfig, device: str, dtype: torch.dtype) -> float:
    """1: changing token t changes nothing before t."""
    law, model = "causal", subject(design, device, dtype)
    tokens = some_tokens(design, 70, device)
    with torch.no_grad():
        before = model(tokens[None])[0][0]
        worst = 0.0
        for t in (1, 2, 6, 33, 63, 64, 69):
            changed = tokens.clone()
            changed[t] = another(design, tokens[t])
            other = model(changed[None])[0][0]
            worst = max(worst, agree(law, f"token {t} changed", {"before": other[:t]}, {"before": before[:t]}))
            if torch.equal(other[t], before[t]):
                raise LawBroken(law, f"token {t} changed nothing at all")
    return worst


def split(design: ModelConfig, device: str, dtype: torch.dtype) -> float:
    """2: any cut into calls, down to one token, equals the whole; gradients through the state too."""
    law, model = "split", subject(design, device, dtype)
    rows = torch.stack([some_tokens(design, 70, device, seed) for seed in (1, 2)])

    def run(pieces: Sequence[int], length: int, state: ModelState) -> Values:
        logits = []
        for piece in rows[:, :length].split(list(pieces), 1):
            y, state = model(piece, state)
            logits.append(y)
        return outcome(list(torch.cat(logits, 1)), state)

    start = leaves(model.init_state(2))
    whole = with_gradients(model, lambda: run([70], 70, start), start)
    with torch.no_grad():
        worst = agree(law, "no state", outcome(list(model(rows)[0]), None), _logits(whole))
    for pieces in ((37, 33), (1, 1, 62, 1, 5), (64, 6)):
        got = with_gradients(model, lambda pieces=pieces: run(pieces, 70, start), start)
        worst = max(worst, agree(law, f"cut into {pieces}", got, whole))
        with torch.no_grad():
            got = run(pieces, 70, model.init_state(2, length=50))
        worst = max(worst, agree(law, f"cut into {pieces} without gradients", got, _values(whole)))
    short = with_gradients(model, lambda: run([12], 12, start), start)
    got = with_gradients(model, lambda: run([1] * 12, 12, start), start)
    worst = max(worst, agree(law, "token by token", got, short))
    with torch.no_grad():
        got = run([1] * 70, 70, model.init_state(2))
    return max(worst, agree(law, "token by token without gradients", got, _values(whole)))


def _logits(values: Values) -> Values:
    return {name: x for name, x in values.items() if name.endswith("logits")}


def _values(values: Values) -> Values:
    return {name: x for name, x in values.items() if not name.startswith("gradient")}


def alone(model: LanguageModel, rows: Sequence[Tensor], state: ModelState | None) -> Values:
    """Every row in a call of its own."""
    values: Values = {}
    for i, row in enumerate(rows):
        logits, after = model(row[None], None if state is None else state.select([i]))
        mine = outcome([logits[0]], after)
        values |= {name.replace("row 0", f"row {i}", 1): x for name, x in mine.items()}
    return values


def packed_rows(model: LanguageModel, rows: Sequence[Tensor], state: ModelState | None) -> Values:
    """The rows end to end."""
    lengths = [len(row) for row in rows]
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=rows[0].device)
    logits, after = model(torch.cat(list(rows))[None], state, cu_seqlens=offsets)
    return outcome(logits[0].split(lengths), after)


def batch(model: LanguageModel, rows: Sequence[Tensor], state: ModelState | None) -> Values:
    """Rows of one length."""
    logits, after = model(torch.stack(list(rows)), state)
    return outcome(list(logits), after)


def padded_rows(model: LanguageModel, rows: Sequence[Tensor], state: ModelState | None, side: str) -> Values:
    """The rows as a batch, the shorter ones filled up with token 3, which must not matter."""
    longest = max(len(row) for row in rows) + 2  # even the longest row is padded
    tokens = torch.full((len(rows), longest, *rows[0].shape[1:]), 3, device=rows[0].device, dtype=rows[0].dtype)
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=rows[0].device)
    places = [slice(longest - len(row), longest) if side == "left" else slice(0, len(row)) for row in rows]
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        tokens[i, place], mask[i, place] = row, 1
    logits, after = model(tokens, state, attention_mask=mask)
    return outcome([logits[i, place] for i, place in enumerate(places)], after)


def history(model: LanguageModel, lengths: Sequence[int], device: str) -> ModelState:
    """A state whose rows have seen different numbers of tokens, ready for gradients."""
    with torch.no_grad():
        rows = [some_tokens(model.design, n, device, seed=n) for n in lengths]
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return leaves(model(torch.cat(rows)[None], model.init_state(len(rows)), cu_seqlens=offsets)[1])


Form = Callable[[LanguageModel, Sequence[Tensor], ModelState | None], Values]


def _equals_alone(law: str, forms: dict[str, Form], model: LanguageModel, rows: Sequence[Tensor], device: str) -> float:
    """Call forms against every row alone: without a state, and going on from histories of unequal length."""
    worst = 0.0
    seen = history(model, [1 + (5 * i) % 9 for i in range(len(rows))], device)
    for name, state in (
        ("", None),
        (", from the start", leaves(model.init_state(len(rows)))),
        (", after a history", seen),
    ):
        want = with_gradients(model, lambda state=state: alone(model, rows, state), state)
        for what, form in forms.items():
            got = with_gradients(model, lambda form=form, state=state: form(model, rows, state), state)
            worst = max(worst, agree(law, what + name, got, want))
            if state is not None:
                with torch.no_grad():
                    got = form(model, rows, state.fork())
                worst = max(worst, agree(law, f"{what}{name}, without gradients", got, _values(want)))
    return worst


def packed(design: ModelConfig, device: str, dtype: torch.dtype) -> float:
    """3: documents packed end to end are the documents alone: outputs, states and all gradients."""
    model = subject(design, device, dtype)
    rows = [some_tokens(design, n, device, seed=i) for i, n in enumerate(DOCUMENTS)]
    return _equals_alone("packed", {f"documents of {DOCUMENTS} tokens": packed_rows}, model, rows, device)


def padded(design: ModelConfig, device: str, dtype: torch.dtype) -> float:
    """4: rows do not depend on their batch mates, and padding on either side changes nothing."""
    law, model = "padded", subject(design, device, dtype)
    rows = [some_tokens(design, n, device, seed=i) for i, n in enumerate((9, 3, 66))]
    forms: dict[str, Form] = {f"padded on the {side}": partial(padded_rows, side=side) for side in ("left", "right")}
    worst = _equals_alone(law, forms, model, rows, device)
    equal = [some_tokens(design, 9, device, seed=i) for i in range(3)]
    return max(worst, _equals_alone(law, {"a batch": batch}, model, equal, device))


def fast(design: ModelConfig, device: str, dtype: torch.dtype) -> float:
    """5: the fast forms are the reference, outputs and all gradients, whatever the length; so with extreme gates."""
    model = subject(design, device, dtype)
    # both forms compute in float32 what models of 16 bits round between layers, until nothing is left to compare
    same = _finite if dtype.itemsize < 4 else _fast_is_reference
    worst = 0.0
    for length in LENGTHS:
        rows = some_tokens(design, length, device, seed=length)[None]
        worst = max(worst, same(f"{length} tokens", model, rows, history(model, [3], device)))
    extreme_gates(model)
    return max(worst, same("100 tokens, extreme gates", model, some_tokens(design, 100, device)[None], None))


def _finite(what: str, model: LanguageModel, rows: Tensor, state: ModelState | None) -> float:
    def run() -> Values:
        logits, after = model(rows, state)
        return outcome(list(logits), after)

    for name, x in with_gradients(model, run, state).items():
        if not x.isfinite().all():
            raise LawBroken("fast", f"{what}, {name}: not finite")
    return 0.0


def _fast_is_reference(what: str, model: LanguageModel, rows: Tensor, state: ModelState | None) -> float:
    def run() -> Values:
        logits, after = model(rows, state)
        return outcome(list(logits), after)

    with forced(None):
        got = with_gradients(model, run, state)
    with forced("reference"):
        want = with_gradients(model, run, state)
    return agree("fast", what, got, want)


def extreme_gates(model: LanguageModel) -> None:
    """Heads that forget everything at once beside heads that forget nothing, and gates that are fully open or shut."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            heads = torch.arange(parameter.numel(), device=parameter.device).view_as(parameter) % 2
            if name.endswith("A_log"):
                parameter.copy_(torch.where(heads == 0, 3.0, -12.0).to(parameter))
            elif name.endswith("dt_bias"):
                parameter.copy_(torch.where(heads == 0, 8.0, -4.0).to(parameter))
            elif name.endswith(("Lambda", "gamma")):
                parameter.copy_(torch.where(heads == 0, 5.0, -12.0).to(parameter))
            elif name.endswith("decay_proj.bias"):  # through a logsigmoid, and divided by 16 at most
                parameter.copy_(torch.where(heads == 0, -2000.0, 2000.0).to(parameter))
            elif name.endswith((".w0", ".a0", ".v0", ".bound")):
                parameter.copy_(torch.where(heads == 0, 12.0, -12.0).to(parameter))
            elif name.endswith("decay_proj.weight"):
                parameter.mul_(30)
        for module in model.modules():
            if isinstance(module, MLSTMLayer):  # within a cap
                module.gates_proj.weight *= 300
            elif isinstance(module, SimpleGLALayer):
                module.in_proj.weight[-len(module.g_bias) :] *= 300
            elif isinstance(module, Mamba2Layer | GatedDeltaNetLayer):
                module.in_proj.weight[-len(module.A_log) :] *= 30
            elif isinstance(module, MambaLayer):
                module.dt_proj.weight *= 30
            elif isinstance(module, RGLRULayer):
                module.gates.weight.mul_(30)
            elif isinstance(module, ElementwiseLayer):
                module.in_proj.weight *= 30
            elif isinstance(module, RecurrentCell) and module.in_proj.bias is not None:
                gates = module.in_proj.bias.view(len(module.cell.inputs), -1)
                units = torch.arange(gates.shape[1], device=gates.device)
                for i, gate in enumerate(gates):  # every combination of open and shut on some unit
                    gate.copy_(torch.where(units >> i & 1 == 0, 12.0, -12.0))
