"""`plait generate`: a continuation, printed as it comes."""

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.command import Outcome, shell
from plait.cli.options import Device, Dtype, MinP, RepetitionPenalty, Run, Seed, Stop, Temperature, TopK, TopP
from plait.cli.trained import Imports, load_imports, opened, perplexity_next, trained

if TYPE_CHECKING:
    from rich.console import Console


def command(
    screen: "Console",
    run: Run,
    prompt: Annotated[str, typer.Argument(help='What to continue; "-" reads standard input.')],
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a question, put into the model's chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = None,
    imports: Imports = None,
) -> Outcome:
    """Continue a prompt with a trained model, printed as it comes."""
    from plait.engine import stream
    from plait.files import letters

    text = sys.stdin.read() if prompt == "-" else letters(prompt)
    again, folder = load_imports(imports), trained(run)
    model, tokenizer = opened(folder, device, dtype)
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
        chat=chat,
    ):
        print(piece, end="", flush=True, file=screen.file)
        pieces.append(piece)
    print(file=screen.file)
    data = {"model": str(folder), "prompt": text, "text": "".join(pieces), "seconds": time.perf_counter() - started}
    following = shell("plait", "chat", run, *again) if chat else perplexity_next(run, folder, again)
    return Outcome(data, next=[following])
