"""Which trained model a user means, and the modules that its layers come from."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.command import shell
from plait.data.gguf_file import gguf_path
from plait.design import load_design
from plait.design.imports import KEY, asked, load_modules
from plait.design.load import SAVED, read_mapping
from plait.files import user_path
from plait.run_folder import RUN
from plait.train import RunConfig, load_run

if TYPE_CHECKING:
    from plait.data import Tokenizer
    from plait.model import LanguageModel

Imports = Annotated[
    list[str] | None,
    typer.Option("--import", help="Load this module or .py file first, for cells of your own; may be given again."),
]


def load_imports(imports: list[str] | None) -> list[str]:
    """Load what --import names; gives the words to say it again."""
    load_modules(asked({KEY: imports or []}))
    return [word for item in imports or [] for word in ("--import", item)]


def trained(spec: str) -> Path:
    """The folder that holds weights: of a run's folder or file, a checkpoint, or a saved model; of GGUF the file. Raises
    ValueError or FileNotFoundError that says what there is instead."""
    from plait.model import model_folder

    if (file := gguf_path(spec)) is not None:
        return file
    path = user_path(spec)
    if path.is_file():
        path = _of_file(path)
    if path.is_dir():
        return model_folder(path.parent if path.name == "checkpoints" else path)
    try:
        load_design(spec)
    except (ValueError, OSError):
        return model_folder(path)  # which says that there is none
    raise ValueError(f"{spec}: a design without weights; train it first: {shell('plait', 'train', f'design={spec}')}")


def opened(folder: Path, device: str, dtype: str | None) -> "tuple[LanguageModel, Tokenizer]":
    """The model there and its tokenizer, as a command's options ask for them."""
    from plait.data import load_tokenizer
    from plait.model.device import find_dtype
    from plait.opening import load

    return load(folder, device, find_dtype(dtype)), load_tokenizer(folder)


def run_of(folder: Path) -> RunConfig | None:
    """The run that a checkpoint is part of."""
    home = _home(folder)
    return None if home is None else load_run(home)


def _home(folder: Path) -> Path | None:
    """The folder of that run."""
    place = folder.resolve()
    return place.parent.parent if place.parent.name == "checkpoints" and (place.parent.parent / RUN).is_file() else None


def perplexity_next(run: str, folder: Path, again: list[str]) -> str:
    """The command that measures it: on what its run held out, or on text that is always there."""
    text = [] if _home(folder) else ["--text", "stdlib", "--tokens", "32768"]
    return shell("plait", "eval", run, "ppl", *text, *again)


def _of_file(path: Path) -> Path:
    if path.name == SAVED or (path.name == RUN and (path.parent / "checkpoints").is_dir()):
        return path.parent
    try:
        data = read_mapping(path)
    except ValueError:
        if path.suffix in (".yaml", ".yml", ".json"):
            raise
        expected = "a run's or a saved model's folder, a run's file in YAML or JSON, or a GGUF file"
        raise ValueError(f"{path}: neither a model nor a run; expected {expected}") from None
    if "design" not in data:
        what = "a design without weights" if "pattern" in data else "no run"
        raise ValueError(f"{path}: {what}; expected a run's or a saved model's folder")
    folder = Path(load_run(path).folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path}: not trained yet, there is no {folder}; first: {shell('plait', 'train', str(path))}"
        )
    return folder
