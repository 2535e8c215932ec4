"""`plait convert`: a transformer into a hybrid."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from inspect import cleandoc
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.changes import read_changes
from plait.cli.command import Outcome, say, shell
from plait.cli.eval_found import FOUND, LM, checked_plan
from plait.cli.trained import run_of
from plait.convert.conversion import Conversion
from plait.design.load import override
from plait.train import DataConfig, RunConfig

if TYPE_CHECKING:
    from rich.console import Console

    from plait.convert.stages import Stages
    from plait.data import Tokenizer
    from plait.model import LanguageModel

PLAN = "plan"
DEFAULT_OUT = "runs/converted"
UNITS = {"k": 1_000, "M": 1_000_000, "B": 1_000_000_000}
CONTEXTS = (
    256,
    1_024,
    4_096,
    16_384,
)  # at which decoding is timed, the last not on a CPU, which reads that far for minutes
SCORED = ("recall", "halo")  # rules that ask for a score of a model
NEEDS = {
    "align": "an align_share above 0",
    "distil": "align_share and finish_share that leave it some of the budget",
    "prune": "prune=25%",
    "finish": "finish_share=0.1",
}  # for a stage to be there
TIMED, ROOM = 32, 64  # tokens that are timed after a context, and those that there is room for
COMMONSENSE, QUESTIONS = ("arc_easy", "hellaswag", "piqa"), 200  # what halo calls that


def command(
    screen: "Console",
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[plan] TEACHER [KEY=VALUE]...",
            help="What plait.load opens; `plan` before it stops once the plan is written; then changes: align.lr=1e-3 body=0.1",
        ),
    ],
    to: Annotated[
        str | None, typer.Option(help='The pattern to become, repeated to the teacher\'s depth: "((DF)3 AF)".')
    ] = None,
    mixer: Annotated[
        str | None, typer.Option(help="What takes attention's place, in turn: letters or kinds, as in D,M.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="How much attention stays: 25%, a number of layers, or addresses A#3,A#7.")
    ] = None,
    select: Annotated[
        str | None, typer.Option(help="The rule that chooses which: uniform, kl, window, gates, ga-s2, recall, halo.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text to train on, as data.source names it. (default: what the teacher's run read, else stdlib)"
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Tokens that training reads in all: 500k, 150M. (default: one for every two weights)"),
    ] = None,
    out: Annotated[str, typer.Option(help="Where the stages, the report and the converted model go.")] = DEFAULT_OUT,
    stage: Annotated[
        str | None, typer.Option(help="Stop after this one: plan, transfer, align, distil, finish, model.")
    ] = None,
    measure: Annotated[
        str | None, typer.Option(help="Measure of both models, beside perplexity and speed: recall,needle,lm:TASK.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="The folder of lm-eval's files, for lm:TASK and the rule halo.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
) -> Outcome:
    from plait.convert.stages import ORDER, Stages
    from plait.design.spelling import suggest
    from plait.train import Interrupted

    only_plan, *rest = (True, *arguments[1:]) if arguments[0] == PLAN else (False, *arguments)
    if not rest or "=" in rest[0]:
        raise ValueError("say which model to convert: plait convert TEACHER --to PATTERN; plait convert --help")
    if stage is not None and stage not in ORDER:
        raise ValueError(f"--stage: there is no stage {stage!r}; {suggest(stage, ORDER)}")
    if only_plan and stage is not None:
        raise ValueError(f"--stage {stage}: `plan` stops after the plan already; leave one of the two out")
    last = PLAN if only_plan else stage or ORDER[-1]
    if tasks is not None and select != "halo" and LM not in (measure or ""):
        raise ValueError("--tasks changes nothing here: it is for --measure lm:TASK and --select halo")
    measures = measured(screen, measure, tasks)
    given = {
        "to": to,
        "mixer": None if mixer is None else mixer.split(","),
        "keep": keep,
        "select": select,
        "device": device,
    }
    asked = conversion(rest[0], out, data, budget, given, rest[1:])
    if not asked.has(last):
        raise ValueError(f"--stage {last}: nothing is asked for there; give {NEEDS[last]}, or leave it out")
    check_positions(asked, measures)
    stages = Stages(asked, screen, scores(asked, tasks))
    again = command_line(
        only_plan, arguments, given | {"data": data, "budget": budget, "measure": measure, "tasks": tasks}, out
    )
    try:
        stages.upto(last)
    except Interrupted as stop:
        raise Interrupted(f"{stop}; to go on: {again}", stop.folder, stop.checkpoint) from None
    if last != ORDER[-1]:
        return halfway(screen, stages, last, again)
    return report(screen, stages, measures, again)


command.__doc__ = f"""Turn a transformer into a hybrid; the same command again goes on where it stopped. Ctrl-C saves.

plait convert TEACHER --to "((DF)3 AF)", or --mixer D --keep 25% --select kl. Stages: plan, transfer (weights carried over),
align (each new layer learns to give what the old one gave), distil (the student learns the teacher's next-token distribution),
finish (the same on longer text), model, report.

Keys, as KEY=VALUE:

{cleandoc(Conversion.__doc__ or "")}
"""


def conversion(
    teacher: str, out: str, data: str | None, budget: str | None, given: Mapping[str, Any], changes: list[str]
) -> Conversion:
    """What the options and changes ask for; where they say nothing, text and budget follow from the teacher."""
    text = {} if data is None else {"source": data}
    base = {"teacher": teacher, "out": out, "data": known_data(teacher) | text}
    said = {name: value for name, value in given.items() if value is not None}
    tokens = {"budget": count(budget) if budget is not None else weights(teacher) // 2}
    asked = read_changes(
        changes,
        Conversion,
        {"data": DataConfig, "training": RunConfig} | dict.fromkeys(("align", "distil", "finish"), RunConfig),
    )
    return Conversion(**override(base | said | tokens, asked))


def check_positions(asked: Conversion, measures: "Mapping[str, Callable[..., Any]]") -> None:
    """Raise ValueError where recall or needles are asked for, and the teacher's positions end before their shortest text."""
    from plait.evaluate.recall import LENGTHS
    from plait.model import LanguageModel
    from plait.opening import folder_design

    asking = [f"--select {asked.select}"] if asked.select in SCORED else []
    asking += [f"--measure {name}" for name in measures if name in FOUND]
    most = LanguageModel.limit(folder_design(asked.teacher)) if asking else None
    if most is not None and most < LENGTHS[0]:
        raise ValueError(
            f"{asking[0]}: asks in texts of {LENGTHS[0]:,} tokens at least, and the teacher's positions end at {most:,}; leave "
            "it out"
        )


def known_data(teacher: str) -> dict[str, Any]:
    """What a teacher that plait trained has read: the same text is held out then."""
    from plait.opening import model_path

    made_by = run_of(model_path(teacher))
    if made_by is None:
        return {}
    return {name: getattr(made_by.data, name) for name in ("source", "length", "heldout", "cache")}


def weights(teacher: str) -> int:
    """How many the teacher has, without reading them."""
    from plait.design.count import parameters
    from plait.opening import folder_design

    return parameters(folder_design(teacher))


def count(text: str) -> int:
    """500k, 150M or plain digits. Raises ValueError for what is no number of tokens."""
    number, unit = (text[:-1], UNITS[text[-1]]) if text[-1:] in UNITS else (text.replace(",", "").replace("_", ""), 1)
    try:
        tokens = int(float(number) * unit)
    except (ValueError, OverflowError):
        tokens = 0
    if tokens < 1:
        raise ValueError(f"--budget {text!r}: expected a number of tokens, such as 500k or 150M")
    return tokens


def command_line(only_plan: bool, arguments: list[str], given: Mapping[str, Any], out: str) -> str:
    """The command that goes on with this conversion; without `plan`, to its end."""
    words = ["plait", "convert", *(arguments[1:] if only_plan else arguments)]
    for name, value in given.items():
        value = ",".join(value) if isinstance(value, list) else value
        if value is not None and (name, value) != ("device", "auto"):
            words += [f"--{name}", str(value)]
    return shell(*words, *(["--out", out] if out != DEFAULT_OUT else []))


def halfway(screen: "Console", stages: "Stages", last: str, again: str) -> Outcome:
    """The ending of a conversion that was to stop before its end."""
    plan = stages.plan
    say(screen, plan.words)
    wrote = stages.folder / (f"{last}.yaml" if last == PLAN else last)
    data = {"folder": str(stages.folder), "stage": last, "plan": plan.to_dict()}
    return Outcome(data, wrote=[wrote], next=[again])


def report(screen: "Console", stages: "Stages", measures: "Mapping[str, Callable[..., Any]]", again: str) -> Outcome:
    """Measure, write it down, and say the figures that matter."""
    from plait.convert.report import ratio, rows, write_report
    from plait.convert.results import RESULTS, results
    from plait.evaluate.machine import described, machine

    facts = machine()
    said = {"command": again, "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": facts}
    data = results(stages, measures, said | {"measured_on": described(facts)})
    page = write_report(stages.folder, data)
    screen.print(table(list(rows(data))))
    student = data["student"]
    say(screen, f"{student['pattern']}: {ratio(data):.3f} times the teacher's perplexity on held-out text")
    folder = str(stages.folder)
    newest = stages.last()
    return Outcome(
        data | {"ratio": ratio(data)},
        wrote=[folder, stages.folder / RESULTS, page],
        next=[shell("plait", "generate", folder, "def "), shell("plait", "eval", str(newest), "ppl")],
    )


def table(rows: list[tuple[str, str, str, str]]) -> Any:
    from rich.table import Table

    grid = Table("measure")
    for name in ("teacher", "student", "student / teacher"):
        grid.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    return grid


def measured(screen: "Console", asked: str | None, tasks: str | None) -> "dict[str, Callable[..., Any]]":
    """What is measured of both models. Raises ValueError for an unknown measure, before anything is loaded."""
    names = [name.strip() for name in asked.split(",")] if asked else []
    plan = checked_plan(names, None, None, None, None, 0, tasks, FOUND, "--tasks")

    def found(name: str) -> "Callable[[LanguageModel, Tokenizer], dict[str, Any]]":
        from plait.cli.eval_found import answer, find

        def by_length(model: "LanguageModel", tokenizer: "Tokenizer") -> dict[str, Any]:
            kinds = find(screen, model, tokenizer, name, plan, "stdlib")["kinds"]
            lengths = {
                kind["length"]: [other for other in kinds if other["length"] == kind["length"]] for kind in kinds
            }
            return {
                f"{name}, {way}": {
                    length: sum(kind[way] for kind in own) / sum(kind["questions"] for kind in own)
                    for length, own in lengths.items()
                }
                for way in ("written", "chosen")
            }

        def task(model: "LanguageModel", tokenizer: "Tokenizer") -> dict[str, Any]:
            said = answer(screen, model, tokenizer, name.removeprefix(LM), plan)
            return {f"{name} {metric}": said[metric] for metric in said if f"{metric}_stderr" in said}

        return task if name.startswith(LM) else by_length

    return {"speed": speed} | {name: found(name) for name in names}


def speed(model: "LanguageModel", tokenizer: "Tokenizer") -> dict[str, Any]:
    """Milliseconds a token and bytes of state, by tokens of context, as far as positions go."""
    from plait.convert.report import STATE
    from plait.evaluate.speed import WARM_UP, speeds

    most = model.max_positions or CONTEXTS[-1] * 2
    contexts = CONTEXTS[:-1] if model.device.type == "cpu" else CONTEXTS
    fit = [n for n in contexts if n + ROOM <= most] or [max(1, most // 2)]
    found = speeds(model, fit, tokens=max(1, min(TIMED, most - fit[-1] - WARM_UP)))
    return {
        "decode ms": {speed.context: speed.decode_ms for speed in found},
        STATE: {speed.context: speed.state_bytes for speed in found},
    }


def scores(asked: Conversion, tasks: str | None) -> "dict[str, Callable[[LanguageModel], float]]":
    """How good a model is, for the rules that choose by it."""
    if asked.select not in SCORED:
        return {}
    from plait.data import answers_in, load_tokenizer
    from plait.evaluate import recall
    from plait.evaluate.tasks import find_file, run_task
    from plait.opening import model_path

    tokenizer = load_tokenizer(model_path(asked.teacher))
    text = asked.data.source if answers_in(asked.data.source) is None else "stdlib"  # records are no running text

    def retrieval(model: "LanguageModel") -> float:
        kinds = recall.recall_kinds(recall.fitting(model, recall.LENGTHS), recall.PAIRS)
        found = recall.measure(model, tokenizer, kinds, text=text, write=False)
        retrieval.tokens = sum(cell.questions * cell.kind.length for cell in found)  # of one call, for the rule's cost
        return sum(cell.chosen for cell in found) / sum(cell.questions for cell in found)

    def commonsense(model: "LanguageModel") -> float:
        shares = [run_task(model, tokenizer, task, tasks or "", limit=QUESTIONS).metrics["acc"] for task in COMMONSENSE]
        return sum(shares) / len(shares)

    if asked.select == "halo" and tasks is None:
        raise ValueError(
            "--select halo weighs retrieval against commonsense: give the folder of lm-eval's files by --tasks"
        )
    for task in COMMONSENSE if asked.select == "halo" else ():
        find_file(task, tasks or "")  # raises before any layer is tried
    return {"recall": retrieval} | ({} if tasks is None else {"commonsense": commonsense})
