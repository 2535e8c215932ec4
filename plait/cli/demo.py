"""`plait demo`: four kinds of model trained on the same text and compared, in a few minutes on a laptop."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.command import Outcome, say, shell
from plait.files import user_path

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_OUT = "runs/demo"


def command(
    screen: "Console",
    text: Annotated[
        str, typer.Option(help="What to train on: a text file, a folder, a glob, or stdlib, Python's source.")
    ] = "stdlib",
    out: Annotated[Path, typer.Option(help="Where the runs and the report go.")] = Path(DEFAULT_OUT),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete what an earlier demo left there, and start over.")
    ] = False,
) -> Outcome:
    """Train a transformer, a recurrent net and two hybrids of equal size on the same text; compare them on one page.

    About five minutes on two CPU cores. Run again, it goes on where it stopped; what is trained stays, unless the text
    or the settings have changed: then the folder's old runs are replaced.
    """
    from plait.study import run_study, table
    from plait.study.demo import demo_study
    from plait.study.report import REPORT
    from plait.study.results import RESULTS
    from plait.train import Interrupted

    out = user_path(out)
    again = shell("plait", "demo", *(["--text", text] if text != "stdlib" else []))
    if str(out) != DEFAULT_OUT:
        again += " " + shell("--out", str(out))
    try:
        data = run_study(demo_study(text, str(out)), command=again, fresh=fresh, console=screen)
    except Interrupted as stop:
        raise Interrupted(f"stopped and saved; to go on: {again}", stop.folder, stop.checkpoint) from None
    for model in data["models"]:
        show_sample(screen, model)
    screen.print(table(data))
    say(screen, f"{len(data['models'])} models trained and measured in {data['seconds']:.0f} s")
    best = min(data["models"], key=lambda model: model["bits_per_byte"])
    return Outcome(
        data,
        wrote=[out / REPORT, out / RESULTS],
        next=[
            shell("plait", "generate", best["folder"], "class ", "--temperature", "0.7"),
            shell("plait", "show", best["pattern"]),
        ],
    )


def show_sample(screen: "Console", model: dict[str, Any]) -> None:
    screen.print(f"{model['name']}, {model['pattern']}", style="bold", markup=False)
    say(screen, f"{model['prompt']}{model['sample']}\n")
