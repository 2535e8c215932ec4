"""`plait export`: a model as a folder that transformers loads as one of its own families."""

from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.command import Outcome, say, shell
from plait.cli.options import Dtype
from plait.cli.trained import Imports, load_imports, trained
from plait.files import user_path

if TYPE_CHECKING:
    from rich.console import Console


def command(
    screen: "Console",
    run: Annotated[
        str, typer.Argument(help="A run's folder or file, a checkpoint, or a saved or imported model's folder.")
    ],
    out: Annotated[str, typer.Argument(help="The folder to write; made if it is not there.")],
    to: Annotated[
        str | None, typer.Option(help="The family, as transformers' model_type. (default: the one it was read from)")
    ] = None,
    dtype: Dtype = None,
    imports: Imports = None,
) -> Outcome:
    """Write a model so that transformers, and what reads its folders (vLLM, SGLang, llama.cpp's converter), load it with equal
    logits."""
    from plait.data.tokenizer_files import OLDER_FILES
    from plait.hub.checkpoint import export
    from plait.hub.families import family
    from plait.model.device import find_dtype
    from plait.opening import load

    if to is not None:
        family(to)  # a wrong name need not wait for the weights
    wanted = find_dtype(dtype)
    load_imports(imports)
    folder = trained(run)
    if user_path(out).resolve() == folder.resolve():
        raise ValueError(f"{out}: is the model itself; expected another folder")
    model = load(folder, dtype=wanted)
    name = export(model, out, to)
    spoken = not model.tokenizer_files.keys().isdisjoint(("tokenizer.json", *OLDER_FILES))
    say(screen, f"{model.design.pattern}: {name}, {'with its tokenizer' if spoken else 'no tokenizer beside it'}")
    data = {"model": str(folder), "family": name, "folder": str(out)}
    return Outcome(
        data, wrote=[out], next=[shell("plait", "generate", out, "The ") if spoken else shell("plait", "show", out)]
    )
