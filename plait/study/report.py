"""A study's results as one HTML page that needs nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from plait.design.summary import size
from plait.evaluate.machine import described
from plait.files import write_text
from plait.pages import plots
from plait.pages import render as render_page

REPORT = "report.html"
TRAINING = ("batch", "optimizer", "lr", "weight_decay", "schedule", "precision", "device")  # what changes numbers


def write_report(folder: Path, data: dict[str, Any]) -> Path:
    """Draw `data`, as results.json holds it, into the folder's report.html."""
    path = folder / REPORT
    write_text(path, render(data))
    return path


def render(data: dict[str, Any]) -> str:
    """The page."""
    models = data["models"]
    return render_page(
        "plait.study",
        "report.html.j2",
        **data,
        training={key: data["study"]["training"][key] for key in TRAINING if key in data["study"]["training"]},
        measured_on=described(data["machine"]),
        columns=columns(models[0]),
        loss_svg=plots.losses(
            [line(model, "losses") for model in models], [line(model, "heldout") for model in models]
        ),
        decode_svg=plots.decode_times([by_context(model, "decode_ms") for model in models]),
        state_svg=plots.state_sizes([by_context(model, "state_bytes") for model in models]),
    )


def columns(first: dict[str, Any]) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """What the table says of a model after its name and pattern: a heading, and the cell under it."""
    shown: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("parameters", lambda model: f"{model['parameters']:,}"),
        ("bits/byte\nheld out", lambda model: f"{model['bits_per_byte']:.3f}"),
        ("training\ntokens/s", lambda model: f"{model['train_tokens_per_s']:,.0f}"),
    ]
    for at in ends(first["decode_ms"]):
        shown.append((f"decode ms/token\nat {int(at):,}", lambda model, at=at: f"{model['decode_ms'][at]:.2f}"))
    for at in ends(first["state_bytes"]):
        shown.append((f"state at\n{int(at):,}", lambda model, at=at: size(model["state_bytes"][at])))
    return shown


def ends(by_context: dict[str, Any]) -> list[str]:
    """The shortest and the longest context, as a table has room for."""
    contexts = sorted(by_context, key=int)
    return contexts if len(contexts) < 2 else [contexts[0], contexts[-1]]


def line(model: dict[str, Any], what: str) -> plots.Line:
    return model["name"], [point[0] for point in model[what]], [point[1] for point in model[what]]


def by_context(model: dict[str, Any], what: str) -> plots.Line:
    contexts = sorted(model[what], key=int)
    return model["name"], [int(context) for context in contexts], [model[what][context] for context in contexts]
