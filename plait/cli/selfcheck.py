"""`plait selfcheck`: the laws that the tests hold, on this machine's device."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.command import Outcome, Terminated, progress_bar, say
from plait.cli.parity import check_families
from plait.cli.trained import Imports, load_imports

if TYPE_CHECKING:
    from rich.console import Console

    from plait.evaluate.selfcheck import LawResult

RANDOM = 200  # designs drawn for --all
LINE_EVERY = 25  # checks, where there is no terminal to draw a bar on


def command(
    screen: "Console",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    pattern: Annotated[
        list[str] | None, typer.Option(help="Check this pattern instead of the built-in list; may be given again.")
    ] = None,
    law: Annotated[list[str] | None, typer.Option(help="Check this law alone; may be given again.")] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float64, float32 or bfloat16 alone; may be given again. (default: the first two)"),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help=f"All three dtypes, {RANDOM} designs drawn from all options besides, and a JSON line at the end.",
        ),
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the checks.")] = 1,
    families: Annotated[
        bool,
        typer.Option("--families", help="Check the families of transformers that plait reads, beside transformers."),
    ] = False,
    imports: Imports = None,
) -> Outcome:
    """Check on this device that every way of calling a model gives the same numbers, for many patterns. Ctrl-C and SIGTERM
    end with the table of what was checked."""
    import torch

    if families:
        return check_families(screen)
    from plait.evaluate.selfcheck import selfcheck
    from plait.model.device import find_device

    load_imports(imports)
    where = str(find_device(device))
    name = torch.cuda.get_device_name(where) if where.startswith("cuda") else "cpu"
    results: list[LawResult] = []
    missing = 0
    with progress_bar(screen) as bar:
        task = bar.add_task("checking", total=None)

        def progress(done: int, total: int, result: "LawResult") -> None:
            nonlocal missing
            results.append(result)
            missing = total - done
            bar.update(task, total=total, completed=done, description=f"{result.law}, {result.pattern}, {result.dtype}")
            if not result.passed:
                say(screen, f"broken: {result.pattern}, {result.dtype}: {result.message}")
            if not screen.is_terminal and (done % LINE_EVERY == 0 or done == total):
                say(screen, f"{done} of {total} checks done")

        dtypes = tuple(dtype or (("float64", "float32", "bfloat16") if everything else ("float32", "float64")))
        try:
            selfcheck(where, dtypes, pattern, law, progress, random=RANDOM if everything else 0, jobs=jobs)
        except (KeyboardInterrupt, Terminated):
            if not results:
                raise
    screen.print(table(results), layer_table(results))
    broken = [result for result in results if not result.passed]
    say(screen, f"{name}, torch {torch.__version__}: {len(results) - len(broken)} of {len(results)} checks passed")
    if missing:
        say(screen, f"stopped: {missing} were not done")
    data = {
        "device": where,
        "device_name": name,
        "torch": torch.__version__,
        "passed": not broken and not missing,
        "not_done": missing,
        "layers": by_layer(results),
        "results": [as_data(result) for result in results],
    }
    after = "plait doctor" if broken else "plait selfcheck" if missing else "plait demo"
    return Outcome(data, next=[after], failed=bool(broken or missing), line=everything)


def table(results: Sequence["LawResult"]) -> Any:
    """One row a law and dtype."""
    from rich.table import Table

    grid = Table("law", "dtype")
    for name in ("checks", "largest error", "allowed", "seconds", "passed"):
        grid.add_column(name, justify="right")
    for law, dtype in dict.fromkeys((result.law, result.dtype) for result in results):
        rows = [result for result in results if (result.law, result.dtype) == (law, dtype)]
        passed = sum(row.passed for row in rows)
        grid.add_row(
            law,
            dtype,
            str(len(rows)),
            f"{max(row.error for row in rows):.1e}",
            f"{max(row.tolerance for row in rows):.1e}" if rows[0].tolerance else "equal",
            f"{sum(row.seconds for row in rows):.1f}",
            "all" if passed == len(rows) else f"{passed} of {len(rows)}",
            style="" if passed == len(rows) else "bold red",
        )
    return grid


def by_layer(results: Sequence["LawResult"]) -> dict[str, dict[str, dict[str, Any]]]:
    """For each kind of layer and law: how many checks of designs with it there were, how many passed."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        for kind in result.layers:
            cell = found.setdefault(kind, {}).setdefault(result.law, {"checks": 0, "passed": 0})
            cell["checks"] += 1
            cell["passed"] += result.passed
    return dict(sorted(found.items()))


def layer_table(results: Sequence["LawResult"]) -> Any:
    """One row a kind of layer, one column a law: how many checks passed."""
    from rich.table import Table

    laws = list(dict.fromkeys(result.law for result in results if result.layers))
    grid = Table("layer", *laws, title="checks passed", title_justify="left")
    for kind, row in by_layer(results).items():
        cells = [row.get(law, {"checks": 0, "passed": 0}) for law in laws]
        broken = any(cell["passed"] < cell["checks"] for cell in cells)
        texts = [
            str(cell["passed"]) if cell["passed"] == cell["checks"] else f"{cell['passed']} of {cell['checks']}"
            for cell in cells
        ]
        grid.add_row(kind, *texts, style="bold red" if broken else "")
    return grid


def as_data(result: "LawResult") -> dict[str, Any]:
    """JSON has no infinity: an error without a number is null."""
    return asdict(result) | {"error": result.error if math.isfinite(result.error) else None}
