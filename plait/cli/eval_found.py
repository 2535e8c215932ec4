"""What `plait eval` says of recall, needles and lm-eval's sets."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from plait.cli.command import progress_bar, say
from plait.design.spelling import suggest

if TYPE_CHECKING:
    from rich.console import Console

    from plait.data import Tokenizer
    from plait.evaluate.recall import Found
    from plait.evaluate.tasks import Result
    from plait.model import LanguageModel

LM = "lm:"
FOUND = ("recall", "needle")
MEASURES = ("ppl", *FOUND)
WAYS = {"written": "written right by the model", "chosen": "right as the likeliest of the candidates"}
EVERY = 30.0  # seconds between lines where there is no terminal

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Plan:
    """The options of these measures; None: the default."""

    lengths: tuple[int, ...] | None
    pairs: tuple[int, ...] | None
    depths: tuple[float, ...] | None
    questions: int | None
    seed: int
    data: str | None


def checked_plan(
    measures: Sequence[str],
    lengths: str | None,
    pairs: str | None,
    depths: str | None,
    questions: int | None,
    seed: int,
    data: str | None,
    known: Sequence[str] = MEASURES,
    option: str = "--data",
) -> Plan:
    """Raises ValueError for a measure that is not among the `known` or an option out of range; finds every file before a model
    is loaded. option: that gives `data`."""
    for measure in measures:
        if measure not in known and not measure.startswith(LM):
            raise ValueError(f"unknown measure {measure!r}; {suggest(measure, (*known, 'lm:TASK'))}")
    tasks = [measure.removeprefix(LM) for measure in measures if measure.startswith(LM)]
    plan = Plan(
        _numbers("--lengths", lengths, int),
        _numbers("--pairs", pairs, int),
        _numbers("--depths", depths, float),
        questions,
        seed,
        data,
    )
    if questions is not None and questions < 1:
        raise ValueError(f"--questions must be at least 1, got {questions}")
    if tasks:
        from plait.evaluate.tasks import find_file

        for task in tasks:
            if data is None:
                raise ValueError(f"lm:{task} is read from files of yours: give their folder by {option}")
            find_file(task, data)
    return plan


def _numbers(option: str, text: str | None, kind: Callable[[str], Number]) -> tuple[Number, ...] | None:
    """Different numbers with commas between them."""
    if text is None:
        return None
    try:
        found = tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"{option} {text!r}: expected numbers with commas between them, as in 512,1024") from None
    if any(not number >= 0 for number in found) or (kind is int and 0 in found):
        raise ValueError(f"{option} {text!r}: expected numbers above 0")
    return found


@contextmanager
def progress(screen: "Console", what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere a line now and then."""
    with progress_bar(screen) as bar:
        task, said = bar.add_task(what, total=None), monotonic()

        def show(done: int, total: int) -> None:
            nonlocal said
            bar.update(task, total=total, completed=done)
            if not screen.is_terminal and monotonic() - said > EVERY:
                said = monotonic()
                say(screen, f"{what}: {done:,} of {total:,} questions")

        yield show


def find(
    screen: "Console", model: "LanguageModel", tokenizer: "Tokenizer", measure: str, plan: Plan, text: str
) -> dict[str, Any]:
    """Measure recall or needles, and say it; gives what the JSON line holds of it."""
    from plait.evaluate import recall

    lengths = plan.lengths or recall.fitting(model, recall.LENGTHS)
    if not lengths:
        raise ValueError(
            f"{measure}: the model's positions end at {model.max_positions:,}, before the shortest default text of "
            f"{recall.LENGTHS[0]:,} tokens; give --lengths"
        )
    if measure == "recall":
        kinds = recall.recall_kinds(lengths, plan.pairs or recall.PAIRS)
    else:
        kinds = recall.needle_kinds(lengths, plan.depths or recall.DEPTHS)
    count = plan.questions or recall.QUESTIONS
    with progress(screen, measure) as show:
        found = recall.measure(model, tokenizer, kinds, text=text, questions=count, seed=plan.seed, progress=show)
    for way in WAYS:
        say(screen, f"{measure}, % {WAYS[way]}")
        screen.print(found_table(measure, way, found))
    total = sum(cell.questions for cell in found)
    shares = {way: sum(getattr(cell, way) for cell in found) / total for way in WAYS}
    say(
        screen,
        f"{measure}: written {shares['written']:.1%}, chosen {shares['chosen']:.1%} of {total:,} questions, seed {plan.seed}",
    )
    return {"text": text, "seed": plan.seed, "questions": total, **shares, "kinds": [cell.as_data() for cell in found]}


def found_table(measure: str, way: str, found: "Sequence[Found]") -> Any:
    """One row a length, one column a number of pairs or a depth; shares of right answers."""
    from rich.table import Table

    def column(cell: "Found") -> str:
        return f"{cell.kind.pairs:,} pairs" if measure == "recall" else f"depth {cell.kind.depth:g} %"

    grid = Table("tokens")
    names = list(dict.fromkeys(column(cell) for cell in found))
    for name in names:
        grid.add_column(name, justify="right", no_wrap=True)
    for length in dict.fromkeys(cell.kind.length for cell in found):
        row = {column(cell): cell for cell in found if cell.kind.length == length}
        grid.add_row(f"{length:,}", *(f"{100 * getattr(row[name], way) / row[name].questions:.0f}" for name in names))
    if way == "chosen":
        chances = {column(cell): cell.kind.chance for cell in found}
        grid.add_row("by chance", *(f"{100 * chances[name]:.0f}" for name in names), style="dim")
    return grid


def answer(screen: "Console", model: "LanguageModel", tokenizer: "Tokenizer", task: str, plan: Plan) -> dict[str, Any]:
    """Measure one of lm-eval's sets, and say it; gives what the JSON line holds of it."""
    from plait.evaluate.tasks import run_task

    assert plan.data is not None
    with progress(screen, LM + task) as show:
        result = run_task(model, tokenizer, task, plan.data, limit=plan.questions, progress=show)
    say(screen, f"{LM}{task}: {', '.join(_metrics(result))} ({result.questions:,} questions of {result.file})")
    return result.as_data()


def _metrics(result: "Result") -> Iterator[str]:
    for name, value in result.metrics.items():
        error = result.errors[name]
        yield f"{name} {value:.4f}{f' ± {error:.4f}' if error is not None else ''}"
