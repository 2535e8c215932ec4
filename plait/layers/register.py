"""Layers and cells of one's own as letters and kinds; a cell's step is looked at first."""

import re
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from types import new_class
from typing import Any, get_type_hints

import torch
from torch import Tensor

from plait.design.layers import KINDS, LETTERS, Layer
from plait.design.layers.recurrent import NonlinearRecurrence
from plait.layers.declared import LayerModule
from plait.layers.recurrent import CELLS, RecurrentLayer, cell_with
from plait.layers.stack import LAYERS
from plait.ops.shooting import Cell

Parts = tuple[Tensor, ...]


def register(letter: str, kind: Any, module: Any = None, **defaults: Any) -> Any:
    """Bind a letter to a layer of one's own, and give its config class.

    kind: a `plait.Cell`: the config is made, with the fields of every recurrent layer (heads, recurrence, clip, ...) and the
    cell's own; its kind is the class name in lower case. Or a `plait.Layer`, with its `module`, a `plait.LayerModule`.
    defaults: values of the config's fields for this letter. Raises ValueError or TypeError where a name is taken or a cell's
    step is not a function of one unit that derivatives exist of. The same class may be registered again.
    """
    if isinstance(kind, type) and issubclass(kind, Layer):
        return _register_layer(letter, kind, module, defaults)
    if module is not None:
        raise TypeError(f"register takes a module beside a plait.Layer; {getattr(kind, '__name__', kind)!r} is none")
    return _register_cell(letter, kind, defaults)


def _register_layer(letter: str, config: Any, module: Any, defaults: dict[str, Any]) -> type[Layer]:
    if not (isinstance(module, type) and issubclass(module, LayerModule)):
        raise TypeError(
            f"{config.__name__} needs its module: register({letter!r}, {config.__name__}, MODULE), a plait.LayerModule"
        )
    kind = str(config.__struct_config__.tag)
    _check_letter(letter, KINDS.get(kind))
    if kind in KINDS and not _same(KINDS[kind], config):
        raise ValueError(f"kind {kind!r} exists already ({KINDS[kind].__name__}); give the class another tag")
    layer = config(**defaults)
    _forget(KINDS.get(kind), config)
    KINDS[kind], LAYERS[config], LETTERS[letter] = config, module, layer
    return config


def _forget(known: Any, config: Any) -> None:
    """The class of this name before it, if there was one, keeps its modules but loses its letters."""
    if known is not config:
        for name in [name for name, bound in LETTERS.items() if type(bound) is known]:
            del LETTERS[name]


def _register_cell(letter: str, cell: Any, defaults: dict[str, Any]) -> type[NonlinearRecurrence]:
    _check_class(cell)
    kind = cell.__name__.lower()
    _check_names(letter, kind, cell)
    known: Any = KINDS.get(kind)
    config = known if known is not None and CELLS[known] is cell else _config(kind, cell)
    layer = config(**defaults)
    with torch.device("cpu"):  # whatever the default device is
        _probe(cell_with(cell, layer))
    _forget(known, config)
    CELLS[config], LAYERS[config] = cell, RecurrentLayer
    KINDS[kind], LETTERS[letter] = config, layer
    return config


def _check_class(cell: Any) -> None:
    name = getattr(cell, "__name__", repr(cell))
    if not (isinstance(cell, type) and issubclass(cell, Cell)):
        raise TypeError(f"register takes a subclass of plait.Cell, got {name}")
    if not is_dataclass(cell) or not cell.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(f"{name}: write @dataclass(frozen=True) above the class, so that equal cells are equal")
    for field in fields(cell):
        if field.name in ("inputs", "states", "weights", "start", "keeps"):
            raise TypeError(f"{name}.{field.name} became a field: write it without a type")
        if field.name in NonlinearRecurrence.__struct_fields__:
            raise TypeError(f"{name}.{field.name} is what every recurrent layer has already; choose another name")


def _same(one: type, other: type) -> bool:
    """Whether one is the other, or what it was before its module or notebook cell ran again."""
    return one is other or (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def _check_names(letter: str, kind: str, cell: type[Cell]) -> None:
    taken = KINDS.get(kind)
    if taken is not None and not (taken in CELLS and _same(CELLS[taken], cell)):  # type: ignore[index]
        raise ValueError(f"kind {kind!r} exists already ({taken.__name__}); give the class another name")
    _check_letter(letter, taken)


def _check_letter(letter: str, taken: Any) -> None:
    if not re.fullmatch(r"[A-Z][a-z]*", letter):
        raise ValueError(f"letter {letter!r}: a letter is a capital and may go on in lower case, such as Z or Zed")
    bound = LETTERS.get(letter)
    if bound is not None and type(bound) is not taken:
        raise ValueError(f"letter {letter!r} is {type(bound).__name__} already; choose another")


def _config(kind: str, cell: Any) -> type[NonlinearRecurrence]:
    """A config class like those of plait.design.recurrent, which counts by asking the cell."""
    types = get_type_hints(cell)
    own = fields(cell)
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in own}

    def sizes(self: NonlinearRecurrence) -> tuple[int, int, int]:
        it = cell_with(cell, self)
        return len(it.inputs), len(it.states), len(it.weights)

    def keeping(self: NonlinearRecurrence) -> tuple[int, int] | None:
        name, sign = getattr(cell, "keeps", None) or (None, 1)
        inputs = cell_with(cell, self).inputs
        return (inputs.index(name), sign) if name in inputs else None  # `_probe` refuses one that is not

    namespace = {
        "__doc__": cell.__doc__,
        "__module__": cell.__module__,
        "__annotations__": {f.name: types[f.name] for f in own},
        "keeping": keeping,
        "sizes": sizes,
        "start": lambda self: tuple(cell_with(cell, self).start),
        **{name: value for name, value in defaults.items() if value is not MISSING},
    }
    options = {"frozen": True, "kw_only": True, "tag": kind}
    return new_class(cell.__name__, (NonlinearRecurrence,), options, lambda body: body.update(namespace))


ROWS, UNITS = 2, 5


def _probe(cell: Cell) -> None:
    """Try the step on random numbers. Raises ValueError that says what the solvers could not work with."""
    name = type(cell).__name__
    if len(cell.start) != len(cell.states):
        raise ValueError(f"{name}.start has {len(cell.start)} numbers for the states {cell.states}")
    gate, sign = getattr(cell, "keeps", None) or (cell.inputs[0], 1)
    if gate not in cell.inputs or sign not in (1, -1):
        raise ValueError(f"{name}.keeps must be one of {cell.inputs} and its sign, 1 or -1; got {(gate, sign)}")
    generator = torch.Generator().manual_seed(0)
    counts = (len(cell.inputs), len(cell.inputs), len(cell.states), len(cell.weights))
    values = [
        [torch.randn(*(() if i == 3 else (ROWS,)), UNITS, generator=generator, dtype=torch.float64) for _ in range(n)]
        for i, n in enumerate(counts)
    ]
    run = _stepper(cell, counts)
    flat = [x for group in values for x in group]
    _check_states(cell, run, flat)
    _check_alone(name, run, flat)
    _check_gradients(name, run, flat)
    _check_jumps(name, run, flat)


def _stepper(cell: Cell, counts: tuple[int, ...]) -> Callable[..., Parts]:
    """The step as a function of its numbers in one row."""

    def run(*flat: Tensor) -> Parts:
        groups, rest = [], flat
        for n in counts:
            groups.append(rest[:n])
            rest = rest[n:]
        return cell.step(*groups)

    return run


def _check_states(cell: Cell, run: Callable[..., Parts], flat: list[Tensor]) -> None:
    name, before = type(cell).__name__, [x.clone() for x in flat]
    new = run(*flat)
    if not isinstance(new, tuple) or len(new) != len(cell.states):
        got = f"{len(new)} values" if isinstance(new, tuple) else f"a {type(new).__name__}"
        raise ValueError(f"{name}.step must return a tuple of its states {cell.states}, got {got}")
    if not all(map(torch.equal, flat, before)):
        raise ValueError(f"{name}.step writes into its arguments; return new tensors")
    for state, x in zip(cell.states, new, strict=True):
        if x.shape != (ROWS, UNITS) or x.dtype != torch.float64:
            raise ValueError(f"{name}.step: {state} must keep shape and dtype, got {tuple(x.shape)} {x.dtype}")
        if not x.isfinite().all():
            raise ValueError(f"{name}.step: {state} is not finite on random numbers")


def _check_alone(name: str, run: Callable[..., Parts], flat: list[Tensor]) -> None:
    """Change one unit (or one row): the others must not notice."""
    new = run(*flat)
    for place in ((..., 1), (1, slice(None))):
        changed = [x.clone() for x in flat]
        for x in changed:
            if x.ndim == 2 or place[0] is ...:
                x[place] += 1.0
        for before, after in zip(new, run(*changed), strict=True):
            same = before == after
            same[place] = True
            if not same.all():
                raise ValueError(
                    f"{name}.step mixes {'units' if place[0] is ... else 'rows'}: it must treat each alone; "
                    "units hear of each other through the recurrence m"
                )


def _check_gradients(name: str, run: Callable[..., Parts], flat: list[Tensor]) -> None:
    leaves = [x.clone().requires_grad_() for x in flat]
    try:
        good = torch.autograd.gradcheck(run, leaves, raise_exception=False)
    except RuntimeError as error:
        raise ValueError(f"{name}.step has no derivatives: {' '.join(str(error).split())[:200]}") from None
    if not good:
        raise ValueError(f"{name}.step: autograd's derivatives are not those of its values")


def _check_jumps(name: str, run: Callable[..., Parts], flat: list[Tensor]) -> None:
    """Go along a line in small steps, and where values change the most, go on in ever smaller ones: a jump stays."""
    generator = torch.Generator().manual_seed(1)
    towards = [3 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in flat]

    def at(t: float) -> Tensor:
        return torch.stack(run(*(x + t * d for x, d in zip(flat, towards, strict=True))))

    low, high, parts = -1.0, 1.0, 256
    while high - low > 1e-9:
        ticks = [low + (high - low) * i / parts for i in range(parts + 1)]
        values = torch.stack([at(t) for t in ticks])
        changes = values.diff(dim=0).abs().flatten(1).amax(1)
        worst = int(changes.argmax())
        low, high, change = ticks[worst], ticks[worst + 1], float(changes[worst])
        if change < 1e-4:
            return
    raise ValueError(f"{name}.step jumps (rounding, sign or a comparison?); solvers need a step without jumps")
