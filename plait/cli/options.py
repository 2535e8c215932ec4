"""Options that more than one command has."""

from typing import Annotated

import typer

Run = Annotated[
    str, typer.Argument(help="A run's folder or file, a checkpoint, a saved model's folder, a GGUF file, or smollm2.")
]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Sample among the fewest tokens of this total probability.")]
MinP = Annotated[float | None, typer.Option(help="Sample among tokens this likely beside the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: make tokens that occurred less likely.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given more than once.")]
Seed = Annotated[int | None, typer.Option(help="Equal seeds give equal samples.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")]
Dtype = Annotated[str | None, typer.Option(help="Of the weights: float32, bfloat16 or float16. (default: as it is)")]
