"""What a conversion gave: the student beside its teacher, stage by stage."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from plait.convert.gates import gates
from plait.convert.plan import attention_places
from plait.convert.stages import PRUNE, TRAINED, TRANSFER, Stages
from plait.data import Tokenizer
from plait.design.count import parameters
from plait.files import json_text, read_text, write_text
from plait.model import LanguageModel, NextToken
from plait.opening import folder_design, load
from plait.run_folder import METRICS
from plait.train import heldout_loss
from plait.train.metrics import read_metrics

RESULTS = "report.json"
MODELS = ("teacher", "student")
BATCH = 8  # sequences that held-out text is read in at a time; changes no number

# Numbers by what they are called; where a number is one for each length of context, those by length.
Measure = Callable[[LanguageModel, Tokenizer], Mapping[str, float | Mapping[int, float]]]


def results(stages: Stages, measures: Mapping[str, Measure], facts: dict[str, Any]) -> dict[str, Any]:
    """All of it as plain data, which is also in the folder's report.json; each of `measures` is taken once, of the teacher
    and of the student, `facts` said as they are."""
    path = stages.folder / RESULTS
    data = json.loads(read_text(path)) if path.is_file() else None
    left = {name: measure for name, measure in measures.items() if data is None or name not in data["measures"]}
    if data is not None and not left:
        return data
    teacher, student = stages.teacher, load(stages.folder, stages.device, torch.float32)
    data = data or {**unmeasured(stages, teacher, student), "measures": []}
    for name, model in zip(MODELS, (teacher, student), strict=True):
        data[name]["measured"] |= measured(stages, model, left)
    data = json.loads(json_text(data | {"measures": [*data["measures"], *left]} | facts))
    write_text(path, json_text(data, indent=1) + "\n")
    return data


def unmeasured(stages: Stages, teacher: LanguageModel, student: LanguageModel) -> dict[str, Any]:
    """What was done, and perplexities."""
    plan, left = stages.plan, stages.left()
    before = (
        left if student.design.tied is not folder_design(stages.last()).tied else left[:-1]
    )  # of whose weights it is made
    after = {name: perplexity(stages, load(stages.folder / name, stages.device, torch.float32)) for name in before}
    pruned = {"pruned": pruned_slots(stages)} if PRUNE in left else {}
    return {
        "teacher": {"name": stages.asked.teacher, **described(stages, teacher)},
        "student": {"name": stages.asked.out, **described(stages, student)},
        "after": after,
        "stages": {name: trained(stages, name) for name in TRAINED if name in left},
        "plan": plan.to_dict() | {"places": [*attention_places(teacher.design)]} | pruned,
        "asked": stages.asked.to_dict(),
    }


def pruned_slots(stages: Stages) -> int:
    """How many parallel slots lost their attention."""
    before, after = (len(gates(folder_design(stages.folder / name))) for name in ("distil", PRUNE))
    return before - after


def described(stages: Stages, model: LanguageModel) -> dict[str, Any]:
    """A model's shape, and its perplexity on held-out text."""
    shape = {"pattern": model.design.pattern, "parameters": parameters(model.design)}
    return shape | {"measured": {"perplexity": perplexity(stages, model)}}


def measured(stages: Stages, model: LanguageModel, measures: Mapping[str, Measure]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, measure in measures.items():
        with stages.console.status(f"measuring {name}"):
            found |= measure(model, stages.tokenizer)
    return found


def perplexity(stages: Stages, model: LanguageModel) -> float:
    """A token, on text that was held out, in pieces as long as those that the student was distilled on."""
    run = stages.asked.runs()[[stage for stage in TRAINED if stages.asked.tokens(stage)][-1]]
    how = {"batch": BATCH, "length": run.data.length, "tokens": run.eval_tokens, "precision": run.precision}
    with stages.console.status("measuring perplexity"):
        return float(torch.tensor(heldout_loss(NextToken(model), stages.shards, **how).loss).exp())


def trained(stages: Stages, stage: str) -> dict[str, Any]:
    """What a stage's run logged; `layers`: each new layer's error at the end of alignment."""
    history = read_metrics(stages.folder / stage / METRICS)
    steps = [record for record in history if "loss" in record]
    last = steps[-1]  # which says what its loss is the sum of where that is more than one
    new = stages.new_layers(folder_design(stages.folder / TRANSFER))
    parts = (last.get("losses") or dict.fromkeys(new, last["loss"])) if stage == "align" else {}
    return {
        "tokens": steps[-1]["tokens"],
        "seconds": sum(record["step_s"] for record in steps),
        "losses": [(record["tokens"], record["loss"]) for record in steps],
        "layers": {address: (part or 0.0) * len(parts) for address, part in parts.items()},
        "heldout": next(record["heldout_loss"] for record in reversed(history) if "heldout_loss" in record),
    }
