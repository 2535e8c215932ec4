"""A study's results as one table on the terminal."""

from typing import Any

from rich.table import Table

from plait.design.summary import size
from plait.study.report import ends


def table(data: dict[str, Any]) -> Table:
    """`data` as results.json holds it: one row a model."""
    models = data["models"]
    decode, state = ends(models[0]["decode_ms"]), ends(models[0]["state_bytes"])
    grid = Table()
    for name in ("model", "pattern"):
        grid.add_column(name, no_wrap=True)
    numbers = ["parameters", "bits/byte\nheld out", "training\ntokens/s"]
    numbers += [f"decode ms/token\nat {int(context):,}" for context in decode]
    numbers += [f"state at\n{int(context):,}" for context in state]
    for name in numbers:
        grid.add_column(name, justify="right", no_wrap=True)
    for model in models:
        grid.add_row(
            model["name"],
            model["pattern"].replace("[", r"\["),
            f"{model['parameters']:,}",
            f"{model['bits_per_byte']:.3f}",
            f"{model['train_tokens_per_s']:,.0f}",
            *(f"{model['decode_ms'][context]:.2f}" for context in decode),
            *(size(model["state_bytes"][context]) for context in state),
        )
    return grid
