"""A study's results as one table on the terminal."""

from typing import Any

from rich.table import Table

from plait.evaluate.machine import described
from plait.study.report import columns


def table(data: dict[str, Any]) -> Table:
    """`data` as results.json holds it: one row a model."""
    models = data["models"]
    shown = columns(models[0])
    grid = Table(caption=f"measured on {described(data['machine'])}", caption_justify="left")
    for name in ("model", "pattern"):
        grid.add_column(name, no_wrap=True)
    for heading, _ in shown:
        grid.add_column(heading, justify="right", no_wrap=True)
    for model in models:
        cells = (cell(model) for _, cell in shown)
        grid.add_row(model["name"], model["pattern"].replace("[", r"\["), *cells)
    return grid
