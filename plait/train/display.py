"""What a run shows: a bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from statistics import median
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from plait.train.solver import SolverRecord

LINES = 20  # about how many steps a plain log shows
PACE = 4  # steps after which it is said how long all will take; the first is slower than the others


class Display:
    """Progress of reading the text, then of the steps. Everything else is a note, one line."""

    def __init__(self, console: Console, steps: int):
        self.console, self.steps = console, steps
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._paces: list[tuple[float, float]] = []  # (seconds, tokens/s) of this process's first steps
        self._solved, self._fell_back = 0, dict[str, int]()  # steps with recurrent layers; falls by layer

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            with self._unless_lost():
                self._bar.stop()
        for address, times in self._fell_back.items():
            self.note(f"{address} fell back to one token after the other in {times} of {self._solved} steps")

    def note(self, text: str) -> None:
        with self._unless_lost():
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _unless_lost(self) -> Iterator[None]:
        """Go on where nothing can be shown any more, on a closed pipe or a full disk: metrics.jsonl has it all."""
        try:
            yield
        except SystemExit:  # rich's at a closed pipe, whose reader has seen enough
            self.console.quiet = True
        except OSError as error:
            self.console.quiet = True
            with suppress(OSError):
                print(
                    f"progress cannot be shown ({error.strerror}); the run goes on, see metrics.jsonl", file=sys.stderr
                )

    def reading(self, done: int, total: int | None) -> None:
        """`done` of `total` bytes of text are tokenized."""
        self._show("reading text, MB", done // 1_000_000, None if total is None else total // 1_000_000, "")

    def step(self, step: int, record: dict[str, Any]) -> None:
        self._expect(step, record)
        facts = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['tokens_per_s']:,.0f} tokens/s"
        if self._bar is not None:
            self._show("training", step, self.steps, facts)
        elif step % max(1, self.steps // LINES) == 0 or step == self.steps:
            left = (self.steps - step) * record["step_s"]
            self.note(f"step {step}/{self.steps}  {facts}  {left:,.0f} s left")

    def _expect(self, step: int, record: dict[str, Any]) -> None:
        """After a few steps, once: how fast they are and how long the rest will take."""
        if len(self._paces) == PACE:
            return
        self._paces.append((record["step_s"], record["tokens_per_s"]))
        if len(self._paces) == PACE and step < self.steps:
            seconds, tokens = (median(values) for values in zip(*self._paces, strict=True))
            self.note(f"{tokens:,.0f} tokens/s: about {duration((self.steps - step) * seconds)} of training to go")

    def solved(self, step: int, layers: Mapping[str, SolverRecord]) -> None:
        """How a step's recurrent layers were solved: a word when one falls back for the first time."""
        self._solved += bool(layers)
        for address, record in layers.items():
            if not record.fell_back:
                continue
            if address not in self._fell_back:
                self.note(
                    f"step {step}: {address} fell back to one token after the other, exact but slow: a gap of {record.gap:.1e} "
                    f"was left after {record.passes} passes; a smaller `clip` in its config or a lower lr keeps it quick"
                )
            self._fell_back[address] = self._fell_back.get(address, 0) + 1

    def _show(self, what: str, done: int, total: int | None, facts: str) -> None:
        if self._bar is None:
            return
        if self._task is None or self._bar.tasks[0].description != what:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=total, completed=done, facts=facts)
        self._bar.update(self._task, total=total, completed=done, facts=facts)


def duration(seconds: float) -> str:
    """In the unit that a person would say."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
