"""`plait generate`: a continuation, printed as it comes."""

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.command import Outcome, shell
from plait.cli.trained import Imports, load_imports, trained

if TYPE_CHECKING:
    from rich.console import Console


def command(
    screen: "Console",
    run: Annotated[str, typer.Argument(help="A run's folder or file, a checkpoint, or a saved model's folder.")],
    prompt: Annotated[str, typer.Argument(help='What to continue; "-" reads standard input.')],
    max_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the fewest tokens of this total probability.")
    ] = None,
    min_p: Annotated[float | None, typer.Option(help="Sample among tokens this likely beside the likeliest.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: make tokens that occurred less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given more than once.")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal samples.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    imports: Imports = None,
) -> Outcome:
    """Continue a prompt with a trained model, printed as it comes."""
    from plait.data import load_tokenizer
    from plait.engine import stream
    from plait.files import letters
    from plait.model.device import find_device
    from plait.opening import load

    text = sys.stdin.read() if prompt == "-" else letters(prompt)
    again, folder = load_imports(imports), trained(run)
    model, tokenizer = load(folder, device=find_device(device)), load_tokenizer(folder)
    started = time.perf_counter()
    pieces = []
    for piece in stream(
        model,
        tokenizer,
        text,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop or (),
        seed=seed,
    ):
        print(piece, end="", flush=True, file=screen.file)
        pieces.append(piece)
    print(file=screen.file)
    data = {"model": str(folder), "prompt": text, "text": "".join(pieces), "seconds": time.perf_counter() - started}
    return Outcome(data, next=[shell("plait", "eval", run, "ppl", *again)])
