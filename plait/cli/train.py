"""`plait train`: one training run, from a file, from key=value, or from both."""

import json
import re
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from plait.cli.changes import reach_letters, read_changes
from plait.cli.command import Outcome, say, shell
from plait.data.gguf_file import gguf_path
from plait.design import PRESETS, ModelConfig
from plait.design.imports import asked, load_modules
from plait.design.load import design_mapping, find_design, is_foreign, override, read_mapping
from plait.design.lora import LoRA
from plait.files import user_path
from plait.train import DataConfig, RunConfig, latest, load_run
from plait.train.config import resolve_design

if TYPE_CHECKING:
    from rich.console import Console


def command(
    screen: "Console",
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN] [KEY=VALUE]...",
            help="A run in YAML or JSON, or a run's folder to go on with; then changes: lr=3e-4 data.source=book.txt",
        ),
    ] = None,
) -> Outcome:
    from plait.data import answers_in
    from plait.engine import generate
    from plait.train import train

    run = run_config(arguments or [])
    if run.start is None and (weights := with_weights(run.design)) is not None:
        say(
            screen,
            f"design {run.design}: its design is used, its weights are not; to go on from those: start={weights}",
        )

    talks = answers_in(run.data.source) == "messages"

    def sample(model: Any, tokenizer: Any, prompt: str) -> str:
        text = generate(model, tokenizer, prompt, max_tokens=48, temperature=0.8, seed=0, chat=talks)
        return f"{prompt} -> {text}" if talks else prompt + text

    result = train(run, sample=sample, console=screen)
    data = {
        "folder": str(result.folder),
        "checkpoint": str(result.checkpoint),
        "step": result.step,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_s": result.tokens_per_s,
        "heldout_loss": result.heldout.loss,
        "bits_per_byte": result.heldout.bits_per_byte,
    }
    folder = str(result.folder)
    first = shell("plait", "chat", folder) if talks else shell("plait", "generate", folder, run.sample_prompt)
    after = [first, shell("plait", "eval", folder, "ppl")]
    if result.done == 0:
        say(screen, f"nothing to do: all {result.step:,} steps of {folder} are done; more with steps=N resume=true")
        return Outcome(data, next=after)
    return Outcome(data, wrote=[result.checkpoint, result.folder / "metrics.jsonl"], next=after)


def with_weights(design: Any) -> Path | None:
    """The folder that a run's `design` names where that holds a trained model too."""
    if not isinstance(design, str) or design in PRESETS or not (folder := Path(design).expanduser()).is_dir():
        return None
    return folder if any(folder.glob("*.safetensors")) else latest(folder)


def keys() -> str:
    """What a run file may say, from where it is declared."""
    paragraphs = []
    for name, config in (("", RunConfig), ("data.", DataConfig), ("lora.", LoRA)):
        fields = [field for field in msgspec.structs.fields(config) if field.name not in ("design", "data")]
        defaults = (
            f"{name}{field.name}="
            + write(field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory())
            for field in fields
        )
        text = re.sub(r" {2,}(?=\w+: )", "\n", cleandoc(config.__doc__ or ""))  # one key a line
        paragraphs += [text, f"Defaults: {' '.join(defaults)}"]
    return "\n\n".join(paragraphs)


def write(value: Any) -> str:
    """A default as it would be typed."""
    text = value if isinstance(value, str) else json.dumps(value)
    return shell(text).replace("'", '"') if set(text) & set(" []") else text


command.__doc__ = f"""Train a model; the same command again goes on where it stopped. Ctrl-C saves.

Keys of a run, in its file or as KEY=VALUE:

{keys()}
"""


def run_config(arguments: list[str]) -> RunConfig:
    """The run that a file, changes, or both describe. Raises ValueError where they describe none, or no design."""
    file = arguments[0] if arguments and "=" not in arguments[0] else None
    if file is not None:
        check_run(file)
    changes = read_changes(arguments[1:] if file else arguments, RunConfig, {"design": ModelConfig})
    load_modules(asked(changes))
    begun = {key: changes[key] for key in ("start",) if key in changes}  # without which a file may be no run yet
    design = changes.get("design") or (load_run(file, **begun).design if file else None)
    if isinstance(design, str) and any(key.startswith("design.") for key in changes):
        design = changes["design"] = design_mapping(design)
    load_modules(asked(design) if isinstance(design, dict) else [])
    bound = design.get("layers", ()) if isinstance(design, dict) else ()
    changes = reach_letters(changes, bound, "design.")
    run = load_run(file, **changes) if file else RunConfig.from_dict(override({}, changes))
    start = run.start or " "
    if run.design is None and gguf_path(start) is None and not user_path(start).is_dir():
        raise FileNotFoundError(f"start: {start}: no such folder; expected a saved model or a training run")
    if run.design is not None or not (gguf_path(start) or is_foreign(user_path(start))):
        # a design that cannot be is said before the text is read
        resolve_design(run.design or run.start or "", vocab=1)
    return run


def check_run(spec: str) -> None:
    """Raise ValueError or FileNotFoundError where `spec` is no run but something that a run can be made of."""
    path = user_path(spec)
    if path.is_dir() and (path / "config.json").is_file():
        home = path.resolve().parent.parent
        of = f"to go on with its run: {shell('plait', 'train', str(home))}; " if (home / "run.yaml").is_file() else ""
        raise ValueError(
            f"{spec}: a saved model, not a run; {of}for its design with new weights: plait train {shell(f'design={spec}')}"
        )
    try:
        if path.is_dir() or (path.is_file() and "pattern" not in read_mapping(path)):
            return
        find_design(spec)
    except (ValueError, OSError):
        return  # `load_run` says what is wrong with it, or that there is no such file
    raise ValueError(
        f"{spec}: a design, not a run's file or folder; to train it: plait train {shell(f'design={spec}')}"
    )
