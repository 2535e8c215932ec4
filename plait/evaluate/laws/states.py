"""Laws 6 to 8: states are values that can be gone back to, copied, stored, moved and weighed."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from plait.design.model import ModelConfig
from plait.evaluate.laws.compare import LawBroken, Values, agree, contents, some_tokens, subject
from plait.model import LanguageModel, build
from plait.state import Appended, Branches, ModelState, SlotState, StaleState


@torch.no_grad()
def rollback(design: ModelConfig, device: str, dtype: torch.dtype) -> float:
    """6: going on from an older state is never having drafted; a handle whose keys were overwritten raises."""
    law, model = "rollback", subject(design, device, dtype)
    prompt, draft, truth = (some_tokens(design, n, device, seed=n)[None] for n in (20, 5, 6))
    _, kept = model(prompt, model.init_state())
    want = _continued(model, kept.fork(), truth)
    logits, drafted = model(draft, kept)
    untouched = drafted.fork()
    worst = agree(law, "after a draft of 5 tokens", _continued(model, kept, truth), want)
    if _has_keys(drafted):
        for what, use in (("continued", lambda: model(draft, drafted)), ("forked", drafted.fork)):
            try:
                use()
            except StaleState:
                continue
            raise LawBroken(law, f"a state with overwritten keys was {what} without an error")
    else:
        worst = max(
            worst,
            agree(law, "the draft itself", _continued(model, drafted, truth), _continued(model, untouched, truth)),
        )
    worst = max(worst, agree(law, "rolled back twice", _continued(model, kept, truth), want))
    # the first three tokens of a draft accepted, the rest never happened
    _, accepted = model(draft[:, :3], kept)
    again, _ = model(draft, kept)
    worst = max(worst, agree(law, "a draft repeated", {"logits": again}, {"logits": logits}))
    _, kept = model(prompt, model.init_state())
    _, accepted = model(draft[:, :3], kept)
    _, straight = model(torch.cat([prompt, draft[:, :3]], 1), model.init_state())
    return max(
        worst, agree(law, "part of a draft", _continued(model, accepted, truth), _continued(model, straight, truth))
    )


def _continued(model: LanguageModel, state: ModelState, tokens: Tensor) -> Values:
    """Logits and final contents of going on with `tokens`, first in one piece, then one by one."""
    logits, state = model(tokens[:, :3], state)
    rest = []
    for token in tokens[:, 3:].split(1, 1):
        y, state = model(token, state)
        rest.append(y)
    return {"logits": torch.cat([logits, *rest], 1)} | contents(state)


def _has_keys(state: ModelState) -> bool:
    def visit(slot: SlotState) -> bool:
        return any(visit(part) for part in slot.parts) if isinstance(slot, Branches) else isinstance(slot, Appended)

    return any(visit(slot) for slot in state.slots)


@torch.no_grad()
def fork(design: ModelConfig, device: str, dtype: torch.dtype) -> float:
    """7: forked, saved and loaded, moved, selected: all go on identically; a state of another design is refused."""
    law, model = "fork", subject(design, device, dtype)
    prompt = torch.stack([some_tokens(design, 20, device, seed=seed) for seed in (1, 2)])
    other, truth = (torch.stack([some_tokens(design, 6, device, seed=seed)] * 2) for seed in (3, 4))
    _, state = model(prompt, model.init_state(2, length=32))
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder) / "state")
        loaded = ModelState.load(Path(folder) / "state", device)
    copies = {
        "forked": state.fork(),
        "saved and loaded": loaded,
        "moved to the CPU and back": state.to("cpu").to(device),
        "rows selected": state.select([0, 1]),
    }
    before = {name: x.clone() for name, x in state.tensors().items()}
    for name, copy in copies.items():
        if copy.lengths != state.lengths:
            raise LawBroken(law, f"{name}: tokens per row {copy.lengths}, expected {state.lengths}")
        agree(law, name, copy.tensors(), before, exactly=True)
    swapped = _continued(model, state.select([1, 0, 1]), truth[[1, 0, 1]])
    model(other, state)  # none of the copies may notice
    worst, want = 0.0, _continued(model, state, truth)
    for name, copy in copies.items():
        agree(law, f"{name}, after the original went on", copy.tensors(), before, exactly=True)
        worst = max(worst, agree(law, name, _continued(model, copy, truth), want))
    mine = {name.replace("row 0", "row 1"): x for name, x in swapped.items() if name.startswith("row 0")}
    worst = max(worst, agree(law, "rows reordered", mine, {name: x for name, x in want.items() if name in mine}))
    _refuses_others(law, model, state)
    return worst


def _refuses_others(law: str, model: LanguageModel, state: ModelState) -> None:
    design = model.design
    wider = {} if design.vocab is None else {"vocabulary": design.replace(vocab=design.vocab + 1)}
    for what, changed in (wider | {"depth": _deeper(design)}).items():
        try:
            token = torch.stack([some_tokens(changed, 1, str(model.device))] * 2)
            build(changed, device=model.device, dtype=model.dtype)(token, state)
        except ValueError:
            continue
        raise LawBroken(law, f"a model of another {what} took the state")


def _deeper(design: ModelConfig) -> ModelConfig:
    return design.replace(pattern=f"({design.pattern})2")


@torch.no_grad()
def spec(design: ModelConfig, device: str, dtype: torch.dtype) -> float:
    """8: a state has the bytes that its spec says, before and after use; what accumulates is float32 at least."""
    law = "spec"
    for model in (subject(design, device, dtype), build(design, device=device, dtype=torch.bfloat16)):
        for batch, length in ((1, 0), (3, 40)):
            spec_bytes = model.state_spec(batch, length).nbytes
            state = model.init_state(batch, length)
            if state.nbytes != spec_bytes:
                raise LawBroken(
                    law, f"batch {batch}, length {length}: {state.nbytes:,} bytes, but the spec says {spec_bytes:,}"
                )
            if length:
                tokens = torch.stack([some_tokens(design, length, device)] * batch)
                _, state = model(tokens, state)
                if state.nbytes != spec_bytes:
                    raise LawBroken(
                        law, f"{state.nbytes:,} bytes after {length} tokens, but the spec says {spec_bytes:,}"
                    )
        for name, x in state.tensors().items():
            wide = torch.float64 if model.dtype == torch.float64 else torch.float32
            if x.dtype != (wide if name.endswith(".s") else model.dtype):
                raise LawBroken(law, f"{name} of a {model.dtype} model is {x.dtype}")
    return 0.0
