"""`plait show`: a design's slots, parameters, FLOPs and state, without building it."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.changes import reach_letters, read_changes
from plait.cli.command import Outcome, say, shell
from plait.data.gguf_file import gguf_path
from plait.design import PRESETS, ModelConfig, load_design, render
from plait.design.count import (
    active_parameters,
    flops_per_token,
    head_flops,
    parameters,
    slot_counts,
    state_bytes,
    transformer_beside,
)
from plait.design.declared import front_weights, head_weights
from plait.design.imports import KEY, asked, load_modules
from plait.design.layers import LETTERS, Layer
from plait.design.load import SAVED, design_file, design_mapping, find_design, is_foreign, read_mapping
from plait.design.merges import MERGE_KINDS
from plait.design.summary import counted, si, size
from plait.design.weights import total
from plait.files import user_path
from plait.run_folder import RUN
from plait.train import RunConfig, load_run

CONTEXTS = {"1k": 1_024, "4k": 4_096, "128k": 131_072}
LETTERS_AT = 768  # how wide the model is in which letters are compared


if TYPE_CHECKING:
    from rich.console import Console


def command(
    screen: "Console",
    spec: Annotated[
        str | None,
        typer.Argument(help="A preset, a pattern, a YAML, JSON or GGUF file, smollm2, or a model's or run's folder."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the design: dim=768 layers.A.heads=4"),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens that a token sees, for FLOPs.")] = 4_096,
    letters: Annotated[bool, typer.Option("--letters", help="Every letter with its layer, state and source.")] = False,
) -> Outcome:
    """Slots, parameters, FLOPs per token and state bytes of a design, beside a transformer of its width; without SPEC, what
    there is to choose from."""
    if letters:
        screen.print(letter_table())
        return Outcome({"letters": letters_data()}, next=['plait show "((DF)3 AF)6" dim=768'])
    if spec is None:
        return overview(screen)
    given = read_changes(changes or [], ModelConfig)
    load_modules(asked(given))
    file, path = gguf_path(spec or " "), user_path(spec or " ")
    foreign = foreign_design(file or path)
    run = run_of(spec) if foreign is None else None
    source = foreign or (spec if run is None else sized(run, given))
    bound = (source if isinstance(source, dict) else find_design(source)[0]).get("layers") or ()
    design = load_design(source, **reach_letters(given, bound))
    screen.print(table(design, context))
    data = as_data(design, context)
    if run is not None:
        tokens = run.steps * run.batch * run.data.length
        say(screen, f"{run.steps:,} steps of {run.batch} x {run.data.length:,} tokens: {si(tokens)} tokens of training")
        data["run"] = {"steps": run.steps, "batch": run.batch, "length": run.data.length, "tokens": tokens}
    inside = [x if x.startswith(f"{KEY}=") else f"design.{x}" for x in changes or [] if not x.startswith("vocab=")]
    if not inside and (file or (path.is_dir() and (design_file(path).parent / "tokenizer.json").is_file())):
        return Outcome(data, next=[shell("plait", "generate", spec, "The ")])
    return Outcome(data, next=[shell("plait", "train", spec if run is not None else f"design={spec}", *inside)])


def foreign_design(path: Path) -> dict[str, Any] | None:
    """Of a GGUF file or another library's folder."""
    if not (gguf_path(path) if path.is_file() else path.is_dir() and is_foreign(path)):
        return None
    from plait.opening import folder_design

    return folder_design(path).to_dict()


def run_of(spec: str) -> RunConfig | None:
    """The run that `spec` describes: a run's file, or a run's folder that has no checkpoint yet."""
    path = user_path(spec or " ")
    if path.is_dir():
        return load_run(path) if design_file(path).name == RUN else None
    return load_run(path) if path.is_file() and "design" in read_mapping(path) and path.name != SAVED else None


def sized(run: RunConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The run's design with a vocabulary: what `given` says, or the tokenizer's."""
    data = run.design if isinstance(run.design, dict) else design_mapping(run.design)
    if "vocab" in data or "vocab" in given:
        return {"vocab": given.get("vocab")} | data
    if isinstance(run.data.tokenizer, dict):
        return data | {"vocab": run.data.tokenizer["bpe"]}  # a small text may give fewer
    from plait.data import load_tokenizer

    return data | {"vocab": load_tokenizer(run.data.tokenizer).vocab}


def contexts(context: int) -> dict[str, int]:
    """Where states are measured, by name, and `context`, by which name that is."""
    return dict(sorted((CONTEXTS | {name_of(context): context}).items(), key=lambda item: item[1]))


def name_of(context: int) -> str:
    named = {length: name for name, length in CONTEXTS.items()}
    return named.get(context, f"{context:,}")


def table(design: ModelConfig, context: int) -> Any:
    """One row a slot, then the totals, beside those of a transformer of this width."""
    from rich.table import Table

    lengths, here = contexts(context), name_of(context)
    counts = {name: slot_counts(design, length) for name, length in lengths.items()}
    grid = Table(title=f"{render(design.chain)}   dim {design.dim}, vocabulary {design.vocab:,}", title_justify="left")
    for name in ("slot", "layer"):
        grid.add_column(name, no_wrap=True)
    for name in ("parameters", f"FLOPs/token at {here}", *(f"state at {name}" for name in lengths)):
        grid.add_column(name, justify="right", no_wrap=True)
    front, head = total(front_weights(design)), total(head_weights(design))
    described = f"{type(design.front).__name__}{', tied' if design.tied else ''}"
    flops = si(sum(weight.flops for weight in front_weights(design)))
    grid.add_row("front", described, si(front), flops, *[""] * len(lengths))
    for index, row in enumerate(counts[here]):
        states = (size(rows[index].state_bytes) if rows[index].state_bytes else "0" for rows in counts.values())
        grid.add_row(row.address.replace("[", r"\["), row.layer, si(row.parameters), si(row.flops), *states)
    grid.add_row(
        "head", type(design.head).__name__, si(head), si(head_flops(design)), *[""] * len(lengths), end_section=True
    )
    grid.add_row("all", f"{len(design.slots)} slots", *totals(design, context))
    if (beside := transformer_beside(design)) is not None:
        grid.add_row(render(beside.chain), "a transformer of this width", *totals(beside, context), style="dim")
    return grid


def totals(design: ModelConfig, context: int) -> list[str]:
    """The last cells of a row."""
    states = (size(state_bytes(design, length)) for length in contexts(context).values())
    return [counted(design), si(flops_per_token(design, context)), *states]


def as_data(design: ModelConfig, context: int) -> dict[str, Any]:
    """The same as plain numbers."""
    lengths = contexts(context)
    counts = {name: slot_counts(design, length) for name, length in lengths.items()}
    slots = [
        {
            "address": row.address,
            "layer": row.layer,
            "parameters": row.parameters,
            "flops_per_token": {name: rows[index].flops for name, rows in counts.items()},
            "state_bytes": {name: rows[index].state_bytes for name, rows in counts.items()},
        }
        for index, row in enumerate(counts[name_of(context)])
    ]
    data = {"pattern": render(design.chain), "design": design.to_dict(), "hash": design.hash, "slots": slots}
    beside = transformer_beside(design)
    other = None if beside is None else {"pattern": beside.pattern, **totals_data(beside, lengths)}
    return data | totals_data(design, lengths) | {"transformer": other}


def totals_data(design: ModelConfig, lengths: dict[str, int]) -> dict[str, Any]:
    return {
        "parameters": parameters(design),
        "active_parameters": active_parameters(design),
        "flops_per_token": {name: flops_per_token(design, length) for name, length in lengths.items()},
        "state_bytes": {name: state_bytes(design, length) for name, length in lengths.items()},
    }


def letters_data() -> dict[str, dict[str, Any]]:
    """Each letter's layer, and its state in a model 768 wide."""
    found = {}
    for letter, layer in LETTERS.items():
        memory = layer.resolve(LETTERS_AT).state(LETTERS_AT, "float32")
        states = {name: memory.sized(1, length).nbytes for name, length in CONTEXTS.items()}
        what = " ".join((inspect.getdoc(type(layer)) or "").split("\n\n")[0].split())
        found[letter] = layer.to_dict() | {"state": memory.kind, "state_bytes": states, "what": what}
    return found


def bound_to(layer: Layer) -> str:
    """A layer's name, and what differs from its defaults."""
    return ", ".join(
        [type(layer).__name__, *(f"{key} {value}" for key, value in layer.to_dict().items() if key != "kind")]
    )


def letter_table() -> Any:
    from rich.table import Table

    grid = Table(title=f"letters, and a layer's state at dim {LETTERS_AT}", title_justify="left", show_lines=True)
    for name in ("letter", "layer", "state", *(f"at {name}" for name in ("1k", "128k"))):
        grid.add_column(name, justify="right" if name.startswith("at") else "left", no_wrap=True)
    grid.add_column("what it is, and where from")
    for letter, data in letters_data().items():
        states = (size(data["state_bytes"][name]) if data["state_bytes"][name] else "0" for name in ("1k", "128k"))
        grid.add_row(letter, bound_to(LETTERS[letter]), data["state"], *states, data["what"].replace("[", r"\["))
    return grid


def overview(screen: "Console") -> Outcome:
    """Presets, letters and merges."""
    from rich.table import Table

    presets = Table(title="presets", title_justify="left")
    for name in ("name", "pattern", "dim", "vocabulary", "parameters"):
        presets.add_column(name, justify="left" if name in ("name", "pattern") else "right", no_wrap=True)
    data: dict[str, Any] = {"presets": {}, "letters": {}, "merges": sorted(MERGE_KINDS)}
    for name in PRESETS:
        design = load_design(name)
        count = parameters(design)
        presets.add_row(name, design.pattern.replace("[", r"\["), str(design.dim), f"{design.vocab:,}", si(count))
        data["presets"][name] = design.to_dict() | {"parameters": count}
    letters = Table(title="letters", title_justify="left")
    letters.add_column("letter")
    letters.add_column("layer")
    for letter, layer in LETTERS.items():
        letters.add_row(letter, bound_to(layer))
        data["letters"][letter] = layer.to_dict()
    screen.print(presets, letters)
    screen.print(f"side by side: [bold]\\[D|A][/bold], merged by {', '.join(sorted(MERGE_KINDS))}, as in \\[D|A]:gated")
    return Outcome(data, next=['plait show "((DF)3 AF)6" dim=768'])
