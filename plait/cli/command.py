"""What all commands share: --json, --debug, errors in one line, and an ending: what was written, what to run next."""

import inspect
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import typer

from plait.files import json_text

INTERRUPTED, TERMINATED = 130, 143  # 128 + SIGINT, 128 + SIGTERM, as shells count
WIDTH = 160  # of tables that go to a file or a pipe, where no terminal sets it
SHARED = {
    "json": Annotated[
        bool, typer.Option("--json", help="End with one JSON object on stdout; all else goes to stderr.")
    ],
    "debug": Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")],
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended. `data` is the JSON line; `wrote`, paths, and `next`, command lines worth running now, are
    said on stderr. line: whether the JSON line is there without --json too."""

    data: dict[str, Any]
    wrote: Sequence[Any] = ()
    next: Sequence[str] = ()
    failed: bool = False
    line: bool = False


class Terminated(BaseException):
    """SIGTERM. No KeyboardInterrupt, after which a conversation goes on."""


def as_command(work: Callable[..., Outcome]) -> Callable[..., int]:
    """`work(screen, ...)` as a function for typer that takes --json and --debug too and gives an exit code.

    `screen` is the console to print to: stdout, or stderr under --json, so that stdout then holds the JSON line alone.
    """

    @wraps(work)
    def run(*, json: bool, debug: bool, **given: Any) -> int:
        try:
            with _terminable():
                outcome = work(console(stderr=json), **given)
                _finish(outcome, json or outcome.line)
                sys.stdout.flush()
        except (typer.Exit, typer.BadParameter):
            raise
        except BrokenPipeError:  # `plait show ... | head`: the reader has seen enough
            _drop_stdout()
            return 1
        except (Exception, KeyboardInterrupt, Terminated) as error:
            if debug:
                traceback.print_exc()
            return fail(one_line(error), exit_code(error), json)
        return int(outcome.failed)

    _, *own = inspect.signature(work).parameters.values()
    shared = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=a) for n, a in SHARED.items()
    ]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + shared
    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]  (what typer reads)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated, so that what is half-written is removed; another one does not disturb that."""
    if threading.current_thread() is not threading.main_thread():  # where Python cannot catch signals
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def console(stderr: bool = False) -> Any:
    """A rich console that does not fold tables where there is no terminal to fit."""
    from rich.console import Console

    screen = Console(stderr=stderr, highlight=False)
    return screen if screen.is_terminal else Console(stderr=stderr, highlight=False, width=WIDTH)


def say(screen: Any, text: str) -> None:
    """One line of plain text, never folded and never read as markup."""
    screen.print(text, markup=False, soft_wrap=True)


def progress_bar(screen: Any) -> Any:
    """Of rich; shows nothing where there is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    return Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)


def shell(*words: str) -> str:
    """A command line of these words, quoted where a shell needs it."""
    special, alive = set(" ()[]|*;&<>#"), set('"$`\\!')  # these mean something within double quotes, too
    return " ".join(f'"{w}"' if special & set(w) and not alive & set(w) else shlex.quote(w) for w in words)


def fail(message: str, code: int, as_json: bool) -> int:
    """Say what went wrong: a line on stderr and, for programs, one JSON object on stdout. Gives `code`."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    try:
        if as_json:
            print(json_text({"error": message, "exit": code}))
        sys.stdout.flush()
    except OSError:  # it cannot be written to, which may be what went wrong
        _drop_stdout()
    return code


def _drop_stdout() -> None:
    """Leave nothing that Python would try to write at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _finish(outcome: Outcome, as_json: bool) -> None:
    for path in outcome.wrote:
        print(f"wrote {path}", file=sys.stderr)
    for line in outcome.next:
        print(f"next: {line}", file=sys.stderr, flush=True)
    if as_json:
        print(json_text(outcome.data), flush=True)


def exit_code(error: BaseException) -> int:
    """1, or what a stopped training run says, or 130 for Ctrl-C and 143 for SIGTERM."""
    from plait.train import TrainingStopped

    if isinstance(error, Terminated):
        return TERMINATED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return error.exit_code if isinstance(error, TrainingStopped) else 1


def _in_a_print(error: BaseException) -> bool:
    """Whether the error comes from the screen: what no file's name comes with."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(modules) and modules[-1].startswith(("plait.cli", "rich"))


# What users cause and can cure. RuntimeError: stale states, stopped runs, and torch where memory is missing.
EXPECTED = (ValueError, OSError, RuntimeError, ImportError)


def one_line(error: BaseException) -> str:
    """An error's message in one line that stands alone."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt | Terminated):
        return "interrupted" if isinstance(error, KeyboardInterrupt) else "terminated"
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        where = error.filename if error.filename is not None else "standard output" if _in_a_print(error) else None
        right = "; expected a folder" if isinstance(error, FileExistsError | NotADirectoryError) else ""
        return f"{where}: {error.strerror}{right}" if where is not None else error.strerror
    if isinstance(error, EXPECTED) and text:
        return text
    if isinstance(error, MemoryError):
        return f"out of memory{f': {text}' if text else ''}; a smaller design, batch or length may fit"
    return f"{type(error).__name__}: {text} (not foreseen; --debug shows where)"
