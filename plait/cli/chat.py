"""`plait chat`: a conversation in the terminal, or with lines from a pipe."""

import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.command import Outcome, one_line, say
from plait.cli.options import Device, Dtype, MinP, RepetitionPenalty, Run, Seed, Stop, Temperature, TopK, TopP
from plait.cli.trained import Imports, load_imports, opened, perplexity_next, trained
from plait.design.spelling import suggest
from plait.files import letters, user_path, write_text

if TYPE_CHECKING:
    from rich.console import Console

    from plait.engine import Chat

PROMPT = "> "
COMMANDS = {"/reset": "begin anew", "/save FILE": "write the messages as JSON", "/help": "say this"}
HELP = [*(f"{name:12} {what}" for name, what in COMMANDS.items()), f"{'Ctrl-C':12} stop the answer; Ctrl-D leaves"]


def command(
    screen: "Console",
    run: Run,
    system: Annotated[str | None, typer.Option(help="A system message before everything else.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Stop an answer after this many tokens.")] = 512,
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
    """Talk with a trained model; each line is a turn. Needs a tokenizer with a chat template.

    /reset begins anew, /save FILE writes the messages as JSON, /help says this. Ctrl-C stops an answer, Ctrl-D leaves.
    """
    from plait.engine import Chat, Sampling

    again, folder = load_imports(imports), trained(run)
    narrowed = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    sampling = Sampling(temperature=temperature, seed=seed, **narrowed)
    model, tokenizer = opened(folder, device, dtype)
    said = None if system is None else letters(system)
    chat = Chat(model, tokenizer, system=said, max_tokens=max_tokens, sampling=sampling, stop=stop or ())
    talk = _Talk(chat, screen, sys.stdin.isatty())
    for line in talk.lines():
        talk.turn(line)
    data = {"model": str(folder), "messages": chat.messages, "turns": talk.turns}
    return Outcome(data, wrote=talk.wrote, next=[perplexity_next(run, folder, again)], failed=talk.failed)


class _Talk:
    """Lines in, answers out. What goes wrong in a turn is said in a line, and the next turn may go well; from a pipe, which
    nobody watches, it also makes the command fail."""

    def __init__(self, chat: "Chat", screen: "Console", watched: bool):
        self.chat, self.screen, self.watched = chat, screen, watched
        self.turns: list[dict[str, Any]] = []
        self.wrote: list[str] = []
        self.failed = False

    def lines(self) -> Iterator[str]:
        """What the user says, until there is no more."""
        if not self.watched:
            yield from filter(str.strip, (line.rstrip("\n") for line in sys.stdin))
            return
        say(self.screen, "/help says what there is besides talking")
        while (line := self._ask()) is not None:
            if line.strip():
                yield line

    def _ask(self) -> str | None:
        """A line, or None to leave: at Ctrl-D, and at Ctrl-C where nothing has been typed."""
        try:
            import readline  # makes `input` a line that can be edited
        except ImportError:
            readline = None
        try:
            if self.screen.stderr:  # stdout is kept for the JSON line
                print(PROMPT, end="", flush=True, file=self.screen.file)
                return input()
            return input(PROMPT)
        except EOFError:
            print(file=self.screen.file)
            return None
        except KeyboardInterrupt:
            print(file=self.screen.file)
            return "" if readline is not None and readline.get_line_buffer() else None

    def turn(self, line: str) -> None:
        try:
            named = re.match(r"/[a-z]+(?=\s|$)", line)
            if named:
                self._command(named[0], line[named.end() :].strip())
            else:
                self._answer(line)
        except (ValueError, OSError) as error:
            self.failed = self.failed or not self.watched
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)

    def _command(self, name: str, rest: str) -> None:
        if name == "/reset":
            self.chat.reset()
        elif name == "/save":
            if not rest:
                raise ValueError("/save: expected a file's name, as in /save talk.json")
            write_text(
                user_path(rest), json.dumps({"messages": self.chat.messages}, ensure_ascii=False, indent=2) + "\n"
            )
            self.wrote.append(rest)
            say(self.screen, f"wrote {rest}")
        elif name == "/help":
            for help in HELP:
                say(self.screen, help)
        else:
            raise ValueError(f"{name}: no such command; {suggest(name, [known.split()[0] for known in COMMANDS])}")

    def _answer(self, line: str) -> None:
        started, before = time.perf_counter(), len(self.chat.tokens)
        with _interrupts() as interrupted, closing(self.chat.say(line)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True, file=self.screen.file)
                if interrupted:
                    break
        print(file=self.screen.file)
        if self.chat.again:
            count = "all" if self.chat.again == before else f"{self.chat.again:,} of"
            print(
                f"read {count} {before:,} tokens again: template or tokenizer write them otherwise now", file=sys.stderr
            )
        seconds = time.perf_counter() - started
        counts = {"read": self.chat.read, "again": self.chat.again, "in_state": len(self.chat.tokens)}
        self.turns.append(counts | {"stopped": bool(interrupted), "seconds": seconds})


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C inside is noted in the list; a second one ends what is being computed at once, which ends the answer too."""
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        noted.append(number)
        if len(noted) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, before)
