"""The laws on the machine at hand: `plait selfcheck`. No test framework, any device."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children, get_context
from time import perf_counter

import torch

from plait.design.model import ModelConfig
from plait.design.pattern import parse
from plait.design.places import layers
from plait.design.spelling import suggest
from plait.evaluate.laws import DESIGNS, EXACT, LAWS, TOLERANCES, LawBroken, packages, small
from plait.evaluate.laws.models import compiled, has_compiler
from plait.evaluate.laws.space import random_designs
from plait.model.device import find_device

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}

GENERATED = ("AF", "DF", "MF")  # designs that inductor also makes code of, which takes it half a minute each


@dataclass(frozen=True, slots=True)
class LawResult:
    """One law on one design. `error` is the largest relative one that was met (infinite where there is no number),
    `tolerance` the largest that the law allows for this dtype; `message` says what broke. layers: kinds of those in it."""

    law: str
    pattern: str
    layers: tuple[str, ...]
    dtype: str
    error: float
    tolerance: float
    seconds: float
    passed: bool
    message: str = ""


Progress = Callable[[int, int, LawResult], None]
Check = tuple[str, str, tuple[str, ...], str, Callable[[], float]]  # law, pattern, layers, dtype, and what to run


def selfcheck(
    device: str = "auto",
    dtypes: Sequence[str] = ("float32", "float64"),
    patterns: Sequence[str | ModelConfig] | None = None,
    laws: Sequence[str] | None = None,
    progress: Progress | None = None,
    *,
    random: int = 0,
    jobs: int = 1,
) -> list[LawResult]:
    """Run every law on every design and dtype. `patterns`: names of the built-in designs, patterns, or whole designs.
    `random`: so many designs drawn from all that a design may say besides, the same ones each time, in the first dtype.

    `jobs`: processes that share the checks.

    device: "auto" takes the GPU where there is one. `progress(done, total, result)` is called after each check.
    Raises ValueError for a law, dtype, pattern or device that does not exist; a law that breaks is a result.
    """
    checks = _checks(str(find_device(device)), dtypes, patterns, laws, random)
    results = []
    for result in _results(checks, jobs):
        results.append(result)
        if progress is not None:
            progress(len(results), len(checks), result)
    return results


def _results(checks: Sequence[Check], jobs: int) -> Iterator[LawResult]:
    if jobs == 1:
        with _full_precision():
            yield from (_run(*check) for check in checks)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_alone) as pool:
        try:
            yield from pool.map(_run, *zip(*checks, strict=True))
        except BaseException:  # what runs may take minutes
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            raise


def _alone() -> None:
    """What a process that has the checks of one core does first."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")


def _checks(
    device: str,
    dtypes: Sequence[str],
    patterns: Sequence[str | ModelConfig] | None,
    laws: Sequence[str] | None,
    random: int,
) -> list[Check]:
    known = [*LAWS, "packages"]
    names = list(known if laws is None else laws)
    for name in names:
        if name not in known:
            raise ValueError(f"law {name!r} does not exist; {suggest(name, known)}")
    for name in dtypes:
        if name not in DTYPES:
            raise ValueError(f"dtype {name!r} cannot be checked; {suggest(name, DTYPES)}")
        if name == "float64" and device.startswith("mps"):
            raise ValueError("float64 does not exist on mps; use dtypes=['float32']")
    designs = dict(DESIGNS) if patterns is None else dict(_design(p) for p in patterns)
    checks: list[Check] = []
    for pattern, design in designs.items():
        inside = kinds(design)
        for dtype in dtypes:
            if dtype == "bfloat16" and patterns is None and not rounds_little(design):
                continue
            for name in names:
                # compilation takes seconds and does not care about digits
                if name != "packages" and (name != "compiled" or dtype == dtypes[0]):
                    checks.append((name, pattern, inside, dtype, partial(LAWS[name], design, device, DTYPES[dtype])))
        if "compiled" in names and pattern in GENERATED and has_compiler():
            run = partial(compiled, design, device, DTYPES[dtypes[0]], backend="inductor")
            checks.append(("compiled", f"{pattern}, inductor", inside, dtypes[0], run))
    if "packages" in names:
        checks.append(("packages", "all of them", (), "float32", partial(packages, list(designs.values()))))
    for number, design in enumerate(random_designs(random)):
        pattern = f"random {number}: {design.pattern}"
        for name in names:
            if name not in ("packages", "compiled"):
                run = partial(LAWS[name], design, device, DTYPES[dtypes[0]])
                checks.append((name, pattern, kinds(design), dtypes[0], run))
    return checks


FEW = 4  # layers and parallel slots


def rounds_little(design: ModelConfig) -> bool:
    """Whether 16 bits leave something to compare: roundings add up from layer to layer, and have a say in which experts are
    chosen."""
    return len(design.places()) <= FEW and "moe" not in kinds(design)


def kinds(design: ModelConfig) -> tuple[str, ...]:
    """Those of its layers, each once."""
    return tuple(dict.fromkeys(str(place.layer.__struct_config__.tag) for place in layers(design.slots)))


def _design(pattern: str | ModelConfig) -> tuple[str, ModelConfig]:
    if isinstance(pattern, ModelConfig):
        return pattern.pattern, pattern
    if pattern in DESIGNS:
        return pattern, DESIGNS[pattern]
    parse(pattern)
    return pattern, small(pattern)


def _run(law: str, pattern: str, inside: tuple[str, ...], dtype: str, check: Callable[[], float]) -> LawResult:
    tolerance = 0.0 if law in EXACT else max(TOLERANCES[DTYPES[dtype]])
    start = perf_counter()
    try:
        error, message = check(), ""
    except LawBroken as broken:
        error, tolerance, message = broken.error, broken.tolerance, str(broken)
    except Exception as crash:  # a kernel that dies on this device is a finding, not the end of the check
        error, message = float("inf"), f"{law}: {type(crash).__name__}: {' '.join(str(crash).split())[:300]}"
    return LawResult(law, pattern, inside, dtype, error, tolerance, perf_counter() - start, not message, message)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products in float32: TF32 keeps 10 bits, which no tolerance here could tell from a mistake."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
