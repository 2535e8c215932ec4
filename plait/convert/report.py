"""A conversion's results as one HTML page that needs nothing else."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from plait.convert.results import MODELS
from plait.design.summary import size
from plait.pages import plots, write_page

REPORT = "report.html"
STATE = "state bytes"  # of what is measured by context, the one that spans powers of two
NAMES = {
    "transfer": "weights carried over",
    "align": "aligned",
    "distil": "distilled",
    "prune": "pruned",
    "finish": "finished on long text",
}
ERROR = "error, as a share of what the layer adds"
LOSS = {"align": ERROR, "distil": "distillation, nats a token", "finish": "finish, nats a token"}


def write_report(folder: Path, data: Mapping[str, Any]) -> Path:
    """Draw `data`, as report.json holds it, into the folder's report.html."""
    values = {
        name: data[name] for name in ("teacher", "student", "plan", "asked", "stages", "command", "date", "machine")
    }
    theirs = data["teacher"]["measured"]["perplexity"]
    return write_page(
        folder / REPORT,
        "plait.convert",
        "report.html.j2",
        **values,
        ratio=ratio(data),
        rows=list(rows(data)),
        after=[(NAMES[name], value, value / theirs) for name, value in data["after"].items()],
        pictures=list(pictures(data)),
        measured_on=data["measured_on"],
    )


def ratio(data: Mapping[str, Any]) -> float:
    """The student's perplexity over the teacher's."""
    return data["student"]["measured"]["perplexity"] / data["teacher"]["measured"]["perplexity"]


def rows(data: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """What is measured, of the teacher, of the student, and the second as a share of the first."""
    teacher, student = (data[name] for name in MODELS)
    yield "parameters", f"{teacher['parameters']:,}", f"{student['parameters']:,}", ""
    for name, theirs in teacher["measured"].items():
        ours = student["measured"][name]
        if not isinstance(theirs, Mapping):
            yield name, *_cells(name, theirs, ours)
            continue
        for length in dict.fromkeys((min(theirs, key=int), max(theirs, key=int))):
            yield f"{name} at {int(length):,}", *_cells(name, theirs[length], ours[length])


def _cells(name: str, theirs: float, ours: float) -> tuple[str, str, str]:
    shown = size if name == STATE else "{:.4g}".format
    return shown(theirs), shown(ours), f"{ours / theirs:.3f}" if theirs else ""


def pictures(data: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """A heading, the picture, and what is seen in it."""
    yield "Plan", plan_picture(data["plan"]), plan_words(data["plan"])
    for stage, trained in data["stages"].items():
        lines = [(stage, [tokens for tokens, _ in trained["losses"]], [loss for _, loss in trained["losses"]])]
        yield (
            stage.capitalize(),
            plots.curves(stage, LOSS[stage], lines),
            "Each point the mean of the steps around it.",
        )
    for name, values in data["teacher"]["measured"].items():
        if isinstance(values, Mapping):
            lines = [by_length(model, data[model]["measured"][name]) for model in MODELS]
            drawn = plots.state_sizes(lines) if name == STATE else plots.by_context(_slug(name), name, lines)
            yield name.capitalize(), drawn, "Teacher and student, by tokens of context."


def plan_picture(plan: Mapping[str, Any]) -> str:
    """Scores by layer, or where nothing was scored, what stays."""
    places, keep = plan["places"], set(plan.get("keep", ()))
    stays = [place in keep for place in places]
    scores = plan.get("scores") or {place: float(place in keep) for place in places}
    label = f"score by {plan.get('rule', 'list')}" if plan.get("scores") else "stays"
    return plots.bars("plan", label, places, [scores[place] for place in places], stays, "stays attention, replaced")


def plan_words(plan: Mapping[str, Any]) -> str:
    kinds = ", ".join(sorted({_kinds(mixer) for mixer in plan["replace"].values()}))
    cost = plan.get("cost", {})
    paid = f" It took {cost['tokens']:,} tokens and {cost['seconds']:.1f} s." if cost.get("tokens") else ""
    kept = len(plan.get("keep", ()))
    chosen = f"{kept} of {len(plan['places'])} attention layers stay, chosen by {plan.get('rule', 'list')}"
    pruned = f" Pruning took attention out of {plan['pruned']}." if "pruned" in plan else ""
    return f"{chosen}; the others became {kinds}.{pruned}{paid}"


def _kinds(mixer: Mapping[str, Any]) -> str:
    if "branches" in mixer:
        return " beside ".join(map(_kinds, mixer["branches"]))
    seen = f" with a window of {mixer['window']:,}" if mixer.get("window") else ""
    return f"{mixer['kind']}{seen}"


def by_length(name: str, values: Mapping[str, float]) -> plots.Line:
    lengths = sorted(values, key=int)
    return name, [int(length) for length in lengths], [values[length] for length in lengths]


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)
