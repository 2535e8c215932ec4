"""The commands and flags there are: a change here is a change for everyone's scripts."""

from rich.text import Text
from typer.main import get_command

from plait.cli.app import app

SURFACE = {
    "show": ["spec", "changes", "--context", "--letters"],
    "train": ["arguments"],
    "convert": [
        *("arguments", "--to", "--mixer", "--keep", "--select", "--data", "--budget", "--out", "--stage", "--measure"),
        *("--tasks", "--device"),
    ],
    "generate": [
        *("run", "prompt", "--chat", "--max-tokens", "--temperature", "--top-k", "--top-p", "--min-p"),
        *("--repetition-penalty", "--stop", "--seed", "--device", "--dtype", "--import"),
    ],
    "chat": [
        *("run", "--system", "--max-tokens", "--temperature", "--top-k", "--top-p", "--min-p"),
        *("--repetition-penalty", "--stop", "--seed", "--device", "--dtype", "--import"),
    ],
    "serve": [
        *("run", "--host", "--port", "--rows", "--length", "--keep", "--max-tokens", "--name", "--device", "--dtype"),
        "--import",
    ],
    "export": ["run", "out", "--to", "--dtype", "--import"],
    "eval": [
        *("run", "measures", "--text", "--context", "--tokens", "--lengths", "--pairs", "--depths", "--questions"),
        *("--seed", "--data", "--device", "--dtype", "--import"),
    ],
    "bench train": [
        *("design", "changes", "--batch", "--length", "--precision", "--compile", "--packed", "--recompute", "--steps"),
        "--device",
    ],
    "bench decode": ["design", "changes", "--context", "--batch", "--precision", "--steps", "--device"],
    "demo": ["--text", "--out", "--fresh"],
    "doctor": ["spec", "changes", "--device"],
    "selfcheck": ["--device", "--pattern", "--law", "--dtype", "--all", "--jobs", "--families", "--import"],
}


def names(command) -> list[str]:
    return [p.opts[0] if p.param_type_name == "option" else p.name for p in command.params]


def commands(group, prefix: str = "") -> dict:
    """By what is typed for them."""
    found = {}
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        found |= commands(command, f"{prefix}{name} ") if inner else {prefix + name: command}
    return found


def test_the_commands_and_their_flags():
    assert {name: names(command) for name, command in commands(get_command(app)).items()} == {
        name: [*flags, "--json", "--debug"] for name, flags in SURFACE.items()
    }


def test_every_command_says_what_it_does():
    for name, command in commands(get_command(app)).items():
        assert command.help, name
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, (name, parameter.name)


def test_help_is_printed_as_it_is_written():
    """Help is read as rich's markup, in which a word in brackets is a style and not printed."""
    for name, command in commands(get_command(app)).items():
        for text in filter(None, [command.help, *(parameter.help for parameter in command.params)]):
            assert Text.from_markup(text).plain == text, name
