"""`import:` in a design or a run: modules that are loaded first, so that layers of one's own are known.

A design or run that the user writes or names is the user's, and what it asks for is loaded. A saved model may come from
anywhere: what its config.json asks for is only said in the error, and loaded by whoever wants it loaded.
"""

import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from zlib import crc32

from plait.files import user_path

KEY = "import"
NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
OWN = (
    "; a layer of your own is known once the module that calls plait.register is loaded: import it first, or name it "
    "(import: MODULE in a file, import=MODULE or --import MODULE on the command line)"
)


def asked(data: dict[str, Any]) -> list[str]:
    """What `import` in a mapping names. Raises ValueError for what is neither a module's name nor a file's."""
    said = data.get(KEY) or []
    items = [said] if isinstance(said, str) else said
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ValueError(
            f"{KEY}: expected a module such as my_cells, a file such as cells.py, or a list of them; got {said!r}"
        )
    for item in items:
        if not item.endswith(".py") and not NAME.fullmatch(item):
            raise ValueError(
                f"{KEY}: {item!r} is no module; expected a name such as my_cells or a file such as cells.py"
            )
    return list(items)


def located(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`data` of a file in `folder`, where modules that lie beside the file are named by their paths."""
    if KEY in data:
        data = data | {KEY: [_beside(item, folder) for item in asked(data)]}
    inner = data.get("design")
    return data | {"design": located(inner, folder)} if isinstance(inner, dict) else data


def _beside(item: str, folder: Path) -> str:
    file = user_path(item if item.endswith(".py") else item.replace(".", "/") + ".py")
    return str((folder / file).absolute()) if (folder / file).is_file() else item


def load_modules(items: Iterable[str]) -> None:
    """Load modules by name or by file, each once. Raises ValueError in one line where that fails."""
    for item in items:
        item = _beside(item, Path.cwd())
        try:
            _load_file(Path(item)) if item.endswith(".py") else _load_name(item)
        except Exception as error:  # the user's own code may fail in any way
            said = " ".join(str(error).split())
            raise ValueError(
                f"{KEY}: {item}: {said if type(error) is ValueError else f'{type(error).__name__}: {said}'}"
            ) from error


def _load_name(name: str) -> None:
    if name in sys.modules:
        return
    try:
        with _findable(Path.cwd()):
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ValueError("no such module; expected one that is installed, in this folder or beside the file") from None


def _load_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError("no such file")
    if any(_file_of(module) == path.resolve() for module in list(sys.modules.values())):
        return
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_{crc32(str(path).encode()):08x}"
    spec = spec_from_file_location(name, path)
    assert spec and spec.loader, path
    module = sys.modules[name] = module_from_spec(spec)
    try:
        with _findable(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _file_of(module: Any) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if isinstance(file, str) else None


@contextmanager
def _findable(folder: Path) -> Iterator[None]:
    """Modules in `folder` can be imported too, after all others."""
    importlib.invalidate_caches()
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def is_own(config: Any) -> bool:
    """Whether a layer's config was registered, not shipped with plait."""
    return type(config).__module__.partition(".")[0] != "plait"


def modules_of(configs: Iterable[Any]) -> list[str]:
    """The modules that registered these layers; none for a script's or notebook's own."""
    return sorted({type(config).__module__ for config in configs if is_own(config)} - {"__main__"})
