"""`plait eval`: how good a trained model is. What it says of perplexity is here, the rest in `plait.cli.eval_found`."""

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.command import Outcome, say, shell
from plait.cli.eval_found import LM, answer, checked_plan, find
from plait.cli.options import Device, Dtype, Run
from plait.cli.trained import Imports, load_imports, opened, run_of, trained
from plait.train import RunConfig

if TYPE_CHECKING:
    from rich.console import Console

    from plait.data import Tokenizer
    from plait.evaluate.perplexity import Perplexity
    from plait.model import LanguageModel
    from plait.train.solver import SolverRecord


USERS = {
    "context": ("ppl",),
    "tokens": ("ppl",),
    "text": ("ppl", "recall", "needle"),
    "lengths": ("recall", "needle"),
    "pairs": ("recall",),
    "depths": ("needle",),
    "questions": ("recall", "needle", LM),
    "seed": ("recall", "needle"),
    "data": (LM,),
}


def command(
    screen: "Console",
    run: Run,
    measures: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MEASURE]...",
            help="ppl: perplexity and bits per byte; recall, needle: facts found again in long texts; lm:TASK: a set of "
            "lm-eval's, as lm:arc_easy.",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text, as data.source names it: to measure on (default: the run's held-out text), to hide facts in "
            "(default: stdlib)."
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="ppl: tokens of context at most. (default: as in training, where that is known)")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="ppl: stop at the end of the piece in which this many tokens are reached.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="recall, needle: tokens of the texts, as 512,2048. (default: 512,1024,2048)")
    ] = None,
    pairs: Annotated[str | None, typer.Option(help="recall: facts in a text. (default: 4,16)")] = None,
    depths: Annotated[
        str | None, typer.Option(help="needle: percent of the text before the fact. (default: 0,25,50,75,100)")
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(
            help="recall, needle: questions of a kind (default: 20); lm: the first of the file (default: all)."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="recall, needle: equal seeds ask equal questions. (default: 0)")
    ] = None,
    data: Annotated[str | None, typer.Option(help="lm: the folder of the sets' files.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    imports: Imports = None,
) -> Outcome:
    """Measure a trained model: on text that it was not trained on, on facts in long texts, on lm-eval's sets."""
    asked = tuple(dict.fromkeys(measures or ("ppl",)))
    plan = checked_plan(asked, lengths, pairs, depths, questions, seed or 0, data)
    found = {"lengths": lengths, "pairs": pairs, "depths": depths, "questions": questions, "seed": seed, "data": data}
    check_used(asked, {"context": context, "tokens": tokens, "text": text} | found)
    for name, value in (("--context", context), ("--tokens", tokens)):
        if value is not None and value < 2:
            raise ValueError(f"{name} must be at least 2, got {value}")

    again, folder = load_imports(imports), trained(run)
    made_by = run_of(folder)
    if "ppl" in asked and text is None and made_by is None:
        raise ValueError(f"{folder} is not part of a training run, so it has no held-out text: give --text")
    model, tokenizer = opened(folder, device, dtype)
    result: dict[str, Any] = {"model": str(folder)}
    for measure in asked:
        if measure == "ppl":
            result |= perplexity(screen, model, tokenizer, made_by, text, context, tokens)
        elif measure.startswith(LM):
            task = measure.removeprefix(LM)
            result.setdefault("lm", {})[task] = answer(screen, model, tokenizer, task, plan)
        else:
            result[measure] = find(screen, model, tokenizer, measure, plan, text or "stdlib")
    return Outcome(result, next=[shell("plait", "generate", run, made_by.sample_prompt if made_by else "The ", *again)])


def check_used(measures: tuple[str, ...], given: dict[str, Any]) -> None:
    """Raise ValueError for an option that no measure asked for uses."""
    kinds = {LM if measure.startswith(LM) else measure for measure in measures}
    for name, users in USERS.items():
        if given[name] is not None and not kinds & set(users):
            raise ValueError(f"--{name} changes nothing here: it is for {' and '.join(users).replace(LM, 'lm:TASK')}")


def perplexity(
    screen: "Console",
    model: "LanguageModel",
    tokenizer: "Tokenizer",
    made_by: RunConfig | None,
    text: str | None,
    context: int | None,
    tokens: int | None,
) -> dict[str, Any]:
    """Measure and say it; gives what the JSON line holds of it."""
    context = context or (made_by.data.length if made_by else model.max_positions)
    with screen.status("reading"):
        if text is not None:
            result = on_text(model, tokenizer, text, context, tokens, made_by.precision if made_by else "float32")
        else:
            assert made_by is not None
            assert context is not None
            tokens = tokens or made_by.eval_tokens
            result = on_heldout(model, tokenizer, made_by, context, tokens)
    source = text or f"held-out part of {made_by.data.source if made_by else ''}"
    way = how(context, tokens)
    data: dict[str, Any] = {
        "text": source,
        "how": way,
        "context": context,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "loss": result.nats_per_token,
        "perplexity": result.perplexity if math.isfinite(result.perplexity) else None,
        "bits_per_byte": result.bits_per_byte,
    }
    say(
        screen,
        f"{source}: {result.bits_per_byte:.4f} bits per byte, perplexity {result.perplexity:.3f} a token "
        f"({result.tokens:,} tokens, {result.bytes:,} bytes)",
    )
    say(screen, f"measured {way}")
    if result.layers:
        from plait.train.solver import as_data

        calls = {address: {"calls": record.calls} for address, record in result.layers.items()}
        data["solver"] = {address: calls[address] | record for address, record in as_data(result.layers).items()}
        screen.print(solver_table(result.layers))
    return data


def solver_table(layers: "dict[str, SolverRecord]") -> Any:
    """A row for each recurrent layer."""
    from rich.table import Table

    grid = Table(title="recurrent layers, solved in parallel over time", title_justify="left")
    grid.add_column("layer", no_wrap=True)
    for name in ("calls", "mean passes", "worst gap", "fell back"):
        grid.add_column(name, justify="right", no_wrap=True)
    for address, f in layers.items():
        row = (f"{f.calls:,}", f"{f.mean_passes:.2f}", f"{f.gap:.1e}", f"{f.fell_back:,}")
        grid.add_row(address.replace("[", r"\["), *row)
    return grid


def how(context: int | None, tokens: int | None) -> str:
    """The way of measuring in words: it decides the number as much as the model does."""
    cut = f"in pieces of {context:,} tokens" if context else "each document whole"
    rest = " and the rest of their last piece" if context else ""
    return f"{cut}, each read from an empty state{f', the first {tokens:,} tokens{rest}' if tokens else ''}"


def on_heldout(
    model: "LanguageModel", tokenizer: "Tokenizer", run: RunConfig, context: int, tokens: int | None
) -> "Perplexity":
    """Over the documents that the run kept apart: with the run's own context and `eval_tokens`, the number training gave."""
    from plait.evaluate.perplexity import Perplexity, checked
    from plait.model import NextToken
    from plait.train import heldout_loss
    from plait.train.inputs import open_shards

    shards = open_shards(run.data, tokenizer, length=context)
    how = {"batch": run.batch, "length": context, "tokens": tokens}
    heldout = heldout_loss(NextToken(model), shards, **how, precision=run.precision)
    return checked(model, Perplexity.of(heldout))


def on_text(
    model: "LanguageModel",
    tokenizer: "Tokenizer",
    text: str,
    context: int | None,
    tokens: int | None,
    precision: str = "float32",
) -> "Perplexity":
    """Over all documents of a source, as held-out documents are measured; what is not text is passed over."""
    from plait.data import NotText, open_source
    from plait.evaluate.perplexity import Perplexity, checked, perplexity_of_document

    total = Perplexity(0.0, 0, 0)
    for document in open_source(text).documents():
        left = None if tokens is None else tokens - total.tokens
        if left is not None and left < 1:
            break
        try:
            total += perplexity_of_document(
                model, tokenizer, document.pieces, context=context, tokens=left, precision=precision
            )
        except NotText:
            if document.required:
                raise
    try:
        return checked(model, total)
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from None
