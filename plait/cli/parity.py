"""`plait selfcheck --families`: what plait reads of transformers' models, beside transformers."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from plait.cli.command import Outcome, say

if TYPE_CHECKING:
    from rich.console import Console

    from plait.hub.parity import Parity

SEEDS = (0, 1, 2)


def check_families(screen: "Console") -> Outcome:
    """Every law on small random models of each family."""
    from rich.progress import track

    from plait.hub.families import TRANSFORMERS
    from plait.hub.parity import LAWS, parity

    results: list[Parity] = []
    total = len(TRANSFORMERS) * len(SEEDS) * len(LAWS)
    for result in track(
        parity(TRANSFORMERS, SEEDS), "checking", total, console=screen, transient=True, disable=not screen.is_terminal
    ):
        results.append(result)
        if result.message:
            say(screen, f"broken: {result.family}, seed {result.seed}, {result.law}: {result.message}")
    screen.print(table(results))
    broken = [result for result in results if result.message]
    say(screen, f"{len(results) - len(broken)} of {len(results)} checks passed, {len(TRANSFORMERS)} families")
    data = {"passed": not broken, "families": by_family(results), "broken": [asdict(result) for result in broken]}
    return Outcome(data, next=["plait show"], failed=bool(broken))


def by_family(results: Sequence["Parity"]) -> dict[str, dict[str, float | None]]:
    """The largest error of each family under each law; none where one could not be asked."""
    found: dict[str, dict[str, float | None]] = {}
    for result in results:
        row = found.setdefault(result.family, {})
        before, error = row.get(result.law, 0.0), result.error
        row[result.law] = None if before is None or error == float("inf") else max(before, error)
    return found


def table(results: Sequence["Parity"]) -> Any:
    """One row a family, one column a law."""
    from rich.table import Table

    found, broken = by_family(results), {(result.family, result.law) for result in results if result.message}
    laws = list(dict.fromkeys(result.law for result in results))
    grid = Table("family", *laws, title="largest difference, of the largest logit", title_justify="left")
    for name, row in found.items():
        texts = ["-" if row.get(law) is None else said(row[law]) for law in laws]
        grid.add_row(name, *texts, style="bold red" if any((name, law) in broken for law in laws) else "")
    return grid


def said(error: float | None) -> str:
    return "equal" if error == 0 else f"{error:.0e}"
