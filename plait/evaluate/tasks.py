"""lm-eval's commonsense sets, read from a folder of the user's: prompts, acc, acc_norm and perplexity as lm-eval (0.4.13) makes
them, without few-shot examples and without needing that package.

| task | file in the folder | a record's fields |
|---|---|---|
| `arc_easy`, `arc_challenge` | `arc_easy*.jsonl`, ... | question, choices {text, label}, answerKey; or query, choices, gold |
| `hellaswag` | `hellaswag*.jsonl` | activity_label, ctx_a, ctx_b, endings, label; or query, choices, gold |
| `hellaswag` | `hellaswag*.txt` | six lines: the prompt, the right ending's number, four endings |
| `piqa` | `piqa*.jsonl` | goal, sol1, sol2, label; or query, choices, gold |
| `winogrande` | `winogrande*.jsonl` | sentence, option1, option2, answer; or context_options, continuation, gold |
| `lambada_openai` | `lambada*.jsonl` | text; or context, continuation |

The first form is the data sets' own, the second that of llm-foundry's local copies, in which ARC's and PIQA's query is the
prompt up to "Answer:".
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from plait.data import DataError, Tokenizer
from plait.data.records import jsonl_records
from plait.design.spelling import suggest
from plait.engine.decode import check_vocab
from plait.evaluate.likelihood import Scored, loglikelihoods
from plait.files import read_text, user_path
from plait.model import LanguageModel


class Example(NamedTuple):
    """A question: (context, continuation) of each choice, the texts whose characters `acc_norm` divides by, and the place of
    the right one."""

    pairs: list[tuple[str, str]]
    choices: list[str]
    gold: int


@dataclass(frozen=True, slots=True)
class Record:
    """One record, whose fields are read by name. Raises DataError naming the file, the record and the field."""

    fields: dict[str, Any]
    where: str

    def text(self, name: str) -> str:
        return self._of(name, str, "a text")

    def texts(self, name: str) -> list[str]:
        values = self._of(name, list, "a list of texts")
        if not values or not all(isinstance(value, str) and value for value in values):
            raise DataError(f"{self.where}: field {name!r} holds {values!r:.60}; expected a list of texts")
        return values

    def inner(self, name: str) -> "Record":
        return Record(self._of(name, dict, "an object"), f"{self.where}, field {name!r}")

    def place(self, name: str, count: int, first: int = 0) -> int:
        """A whole number, or its digits, that counts from `first`, as a place among `count`."""
        value = self._of(name, int | str, "a whole number")
        if str(value) not in map(str, range(first, first + count)):
            raise DataError(f"{self.where}: field {name!r} is {value!r}; expected {first} to {first + count - 1}")
        return int(value) - first

    def _of(self, name: str, kind: Any, expected: str) -> Any:
        if name not in self.fields:
            raise DataError(f"{self.where}: no field {name!r}; there are {', '.join(map(repr, self.fields)) or 'none'}")
        value = self.fields[name]
        if not isinstance(value, kind) or isinstance(value, bool) or value == "":
            raise DataError(f"{self.where}: field {name!r} holds {value!r:.60}; expected {expected}")
        return value


def _choose(context: str, choices: list[str], gold: int) -> Example:
    return Example([(context, f" {choice}") for choice in choices], choices, gold)


def _answered(record: Record) -> Example:
    """llm-foundry's query, which ends where "Answer:" begins."""
    choices = record.texts("choices")
    context = record.text("query").removesuffix("\n") + "\nAnswer:"
    return _choose(context, choices, record.place("gold", len(choices)))


def _arc(record: Record) -> Example:
    if "query" in record.fields:
        return _answered(record)
    options = record.inner("choices")
    choices, labels, key = options.texts("text"), options.texts("label"), record.text("answerKey")
    if key not in labels or len(labels) != len(choices):
        raise DataError(f"{record.where}: field 'answerKey' is {key!r}; expected one of {', '.join(labels)}")
    return _choose(f"Question: {record.text('question')}\nAnswer:", choices, labels.index(key))


def _piqa(record: Record) -> Example:
    if "query" in record.fields:
        return _answered(record)
    choices = [record.text("sol1"), record.text("sol2")]
    return _choose(f"Question: {record.text('goal')}\nAnswer:", choices, record.place("label", 2))


def _hellaswag(record: Record) -> Example:
    if "query" in record.fields:
        choices = record.texts("choices")
        return _choose(record.text("query"), choices, record.place("gold", len(choices)))
    second = record.text("ctx_b") if record.fields.get("ctx_b") != "" else ""
    prompt = f"{record.text('activity_label')}: {record.text('ctx_a')} {second.capitalize()}"
    endings = [_without_marks(ending) for ending in record.texts("endings")]
    return _choose(_without_marks(prompt), endings, record.place("label", len(endings)))


def _without_marks(text: str) -> str:
    """HellaSwag's text without the marks that WikiHow's part of it holds."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande(record: Record) -> Example:
    """The options are in the contexts; what follows them is scored."""
    if "context_options" in record.fields:
        contexts, rest = record.texts("context_options"), record.text("continuation")
        gold = record.place("gold", len(contexts))
    else:
        before, gap, after = record.text("sentence").partition("_")
        if not gap:
            raise DataError(f"{record.where}: field 'sentence' has no '_'")
        contexts = [before + record.text("option1"), before + record.text("option2")]
        rest, gold = after.strip(), record.place("answer", 2, first=1)
    return Example([(context, f" {rest}") for context in contexts], contexts, gold)


def _lambada(record: Record) -> Example:
    if "text" not in record.fields:
        return _choose(record.text("context"), [record.text("continuation")], 0)
    context, _, last = record.text("text").rpartition(" ")
    return _choose(context, [last], 0)


@dataclass(frozen=True, slots=True)
class Task:
    """`files`: how names of its files begin; `example`: a record as a question; `metrics`: those that lm-eval reports."""

    files: str
    example: Callable[[Record], Example]
    metrics: tuple[str, ...] = ("acc", "acc_norm")


TASKS = {
    "arc_easy": Task("arc_easy", _arc),
    "arc_challenge": Task("arc_challenge", _arc),
    "hellaswag": Task("hellaswag", _hellaswag),
    "piqa": Task("piqa", _piqa),
    "winogrande": Task("winogrande", _winogrande, ("acc",)),
    "lambada_openai": Task("lambada", _lambada, ("acc", "perplexity")),
}


@dataclass(frozen=True, slots=True)
class Result:
    """Of a task: the file, the `questions` asked, and each metric with its standard error (None: lm-eval has a bootstrap)."""

    task: str
    file: Path
    questions: int
    metrics: dict[str, float]
    errors: dict[str, float | None]

    def as_data(self) -> dict[str, Any]:
        data: dict[str, Any] = {"file": str(self.file), "questions": self.questions}
        for name, value in self.metrics.items():
            data |= {name: value, f"{name}_stderr": self.errors[name]}
        return data


def find_file(task: str, folder: str | Path) -> Path:
    """The one file of a task in a folder. Raises ValueError for an unknown task or more than one file,
    FileNotFoundError for none."""
    if task not in TASKS:
        raise ValueError(f"unknown task lm:{task}; {suggest(task, TASKS)}")
    folder, begins = user_path(folder), TASKS[task].files
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with the files of lm:{task}")
    kinds = (".jsonl", ".txt") if task == "hellaswag" else (".jsonl",)
    found = sorted(path for path in folder.iterdir() if path.name.startswith(begins) and path.suffix in kinds)
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{folder}: lm:{task} has {' and '.join(path.name for path in found)}; leave one there")
    packed = sorted(path.name for path in folder.glob(f"{begins}*"))
    hint = f" ({packed[0]} is there: unpack it first)" if packed else ""
    raise FileNotFoundError(f"{folder}: no file of lm:{task}; expected {begins}*{kinds[0]}{hint}")


def read_task(task: str, path: Path) -> Iterator[tuple[str, Example]]:
    """(where it stands, the question) of each record. Raises DataError naming the file, the record and the field."""
    records = six_lines(path) if path.suffix == ".txt" else jsonl_records(path, f"the fields of {task}")
    for line, fields in records:
        where = f"{path}, line {line}"
        yield where, TASKS[task].example(Record(fields, where))


def six_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """HellaSwag as llama.cpp reads it: the prompt, the right ending's number and four endings, a line each."""
    lines = read_text(path).splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) % 6:
        raise DataError(f"{path}: {len(lines):,} lines; expected six a question: prompt, number, four endings")
    for at in range(0, len(lines), 6):
        query, gold, *choices = (line.strip() for line in lines[at : at + 6])
        yield at + 1, {"query": query, "choices": choices, "gold": gold}


def run_task(
    model: LanguageModel,
    tokenizer: Tokenizer,
    task: str,
    folder: str | Path,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Result:
    """A task's metrics over its file in `folder`, or over the first `limit` records. `progress` is told how many records of how
    many are scored."""
    check_vocab(model, tokenizer)
    path = find_file(task, folder)
    examples = list(islice(read_task(task, path), limit))
    if not examples:
        raise DataError(f"{path}: no records")
    flat = ((*encode_pair(tokenizer, *pair), where) for where, example in examples for pair in example.pairs)
    scored = loglikelihoods(model, flat)
    values: list[dict[str, float]] = []
    for _, example in examples:
        values.append(score_example(example, list(islice(scored, len(example.pairs)))))
        progress(len(values), len(examples))
    return summary(task, path, values)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both as lm-eval makes them: spaces at the context's end belong to the continuation, and what the continuation adds
    to the ids of the context is its own. After nothing, it follows the end of a text."""
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    if not context:
        return [tokenizer.eos], tokenizer.encode(continuation)
    before = tokenizer.encode(context)
    return before, tokenizer.encode(context + continuation)[len(before) :]


def score_example(example: Example, scores: Sequence[Scored]) -> dict[str, float]:
    """acc: the likeliest choice is the right one, or, where there is one alone, each of its tokens was the likeliest; acc_norm:
    the same by log-likelihood for a character; loglikelihood: of the right choice."""
    if len(scores) == 1:
        return {"acc": float(scores[0].greedy), "loglikelihood": scores[0].loglikelihood}
    sums = [score.loglikelihood for score in scores]
    a_character = [total / len(text) for total, text in zip(sums, example.choices, strict=True)]
    best, best_norm = (
        sums.index(max(sums)),
        a_character.index(max(a_character)),
    )  # the first of equals, as numpy's argmax
    return {
        "acc": float(best == example.gold),
        "acc_norm": float(best_norm == example.gold),
        "loglikelihood": sums[example.gold],
    }


def summary(task: str, path: Path, values: Sequence[dict[str, float]]) -> Result:
    metrics: dict[str, float] = {}
    errors: dict[str, float | None] = {}
    for name in TASKS[task].metrics:
        if name == "perplexity":
            metrics[name], errors[name] = perplexity([value["loglikelihood"] for value in values]), None
        else:
            metrics[name], errors[name] = mean_and_error([value[name] for value in values])
    return Result(task, path, len(values), metrics, errors)


def perplexity(loglikelihoods: Iterable[float]) -> float:
    """Of whole continuations, not of tokens, as lm-eval's LAMBADA has it."""
    values = list(loglikelihoods)
    try:
        return math.exp(-sum(values) / len(values))
    except OverflowError:
        return math.inf


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error from the sample's deviation; None of one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
