"""The `plait` command."""

import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated, cast

import typer
from typer.main import get_command

import plait
from plait.cli import bench, chat, convert, demo, doctor, eval, export, generate, selfcheck, serve, show, train
from plait.cli.command import INTERRUPTED, as_command, fail

app = typer.Typer(
    help="plait: draw any hybrid of attention and recurrence, train it, measure it, generate from it.",
    epilog="Start with: plait demo, or plait show",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (show, train, convert, generate, chat, serve, export, eval, demo, doctor, selfcheck):
    name = module.__name__.rpartition(".")[2]
    app.command(name)(as_command(module.command))
app.add_typer(bench.app, name="bench")


@app.callback(invoke_without_command=True)
def plait_command(
    ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"plait {plait.__version__}")
    elif ctx.invoked_subcommand is None:
        print(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")  # as files are read, whatever the locale
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """The exit code of `plait ARGUMENTS`."""
    try:
        return get_command(app).main(list(arguments), prog_name="plait", standalone_mode=False) or 0
    except typer.Abort:
        return INTERRUPTED
    except UsageError as error:
        message = error.format_message().rstrip(".")
        asked = error.ctx.command_path if error.ctx else "plait"
        line = f"{message[:1].lower()}{message[1:]}; see {asked} --help"
        return fail(" ".join(line.split()), error.exit_code, "--json" in arguments)


# Typer has had its own copy of click since 0.16 or so; this is the class that either raises for wrong usage.
UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])
