"""`plait serve`: a trained model over HTTP."""

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.command import Outcome, say, shell
from plait.cli.options import Device, Dtype, Run
from plait.cli.trained import Imports, load_imports, opened, trained
from plait.files import user_path

if TYPE_CHECKING:
    from rich.console import Console

GRACE = 5  # seconds that answers are given to end


def command(
    screen: "Console",
    run: Run,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes one that is free.")] = 8000,
    rows: Annotated[int, typer.Option(min=1, help="Requests written at a time; others wait.")] = 8,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a prompt and its answer, at most. (default: as far as positions go)"),
    ] = None,
    keep: Annotated[
        int, typer.Option(min=0, help="States of ended requests, from which prompts that begin so go on.")
    ] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, where a request does not say.")] = 1024,
    name: Annotated[str | None, typer.Option(help="What clients call the model. (default: the folder's name)")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    imports: Imports = None,
) -> Outcome:
    """Serve a trained model over HTTP with OpenAI's paths; Ctrl-C ends it.

    POST /v1/chat/completions and /v1/completions, whole or streamed; GET /v1/models and /health.
    """
    from plait.serve import Batch, Service

    load_imports(imports)
    folder = trained(run)
    with _listening(host, port) as listening:
        model, tokenizer = opened(folder, device, dtype)
        batch = Batch(model, rows=rows, length=length, keep=keep, vocab=tokenizer.vocab)
        service = Service(batch, tokenizer, name or called(run), max_tokens)
        at = f"http://{host}:{listening.getsockname()[1]}"
        say(screen, f"serving {service.name} at {at}/v1, {rows} rows; Ctrl-C ends it")
        ask = '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}'
        path = "chat/completions" if tokenizer.chat_template is not None else "completions"
        if path == "completions":
            ask = '{"prompt": "Hello", "max_tokens": 64}'
        say(screen, f"try: {shell('curl', f'{at}/v1/{path}', '-d', ask)}")
        _serve(service, listening)
    data = {"model": str(folder), "url": f"{at}/v1", "requests": batch.requests, "tokens": batch.written}
    say(screen, f"{batch.requests:,} answers, {batch.written:,} tokens")
    return Outcome(data)


def called(run: str) -> str:
    """The model's name where none is given: that of the folder or file that was named, or what stands for one."""
    path = user_path(run)
    return path.stem if path.is_file() else path.resolve().name if path.exists() else run


def _listening(host: str, port: int) -> socket.socket:
    """Before the model is loaded, which takes longer than to say that somebody else is there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise OSError(f"cannot listen at {host}:{port} ({why}); --port 0 takes a free one") from None


def _serve(service: Any, listening: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(service.app(), log_level="warning", timeout_graceful_shutdown=GRACE)
    with suppress(KeyboardInterrupt):  # it lets its caller know, after it has stopped
        uvicorn.Server(config).run(sockets=[listening])
