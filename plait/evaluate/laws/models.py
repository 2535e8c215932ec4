"""Laws 9 to 11 and 13: weights survive files, counts are measured, one graph, and packages nobody asked for."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.function import BackwardCFunction
from torch.utils.flop_counter import FlopCounterMode

from plait.design import GELU, Attention, GatedConv, Mixer, count, declared
from plait.design.model import ModelConfig
from plait.design.places import Place, layers
from plait.design.weights import FLOAT32
from plait.evaluate.laws import graphs
from plait.evaluate.laws.compare import (
    AUTOCAST,
    LawBroken,
    Values,
    agree,
    outcome,
    some_tokens,
    subject,
    with_gradients,
)
from plait.model import LanguageModel, build, init_weights, save, swap
from plait.opening import load
from plait.ops.graph import LOOKS_INSIDE
from plait.ops.kernels import forced


@torch.no_grad()
def files(design: ModelConfig, device: str, dtype: torch.dtype) -> float:
    """9: what is loaded is what was saved, to the bit; decays keep their values and width; strays are errors."""
    law = "files"
    for model in (subject(design, device, dtype), build(design, device=device, dtype=torch.bfloat16)):
        with tempfile.TemporaryDirectory() as folder:
            save(model, folder)
            copy = load(folder, device)
            _equal_weights(law, dict(model.named_parameters()), dict(copy.named_parameters()), wide_names(design))
            tokens = some_tokens(design, 9, device)[None]
            agree(law, "logits", {"": copy(tokens)[0]}, {"": model(tokens)[0]}, exactly=True)
            _refuses_strays(law, Path(folder))
    fresh = build(design, device="cpu")
    before = {name: p.clone() for name, p in fresh.named_parameters()}
    init_weights(fresh)
    _equal_weights(law, before, dict(fresh.named_parameters()), wide_names(design))
    return 0.0


def wide_names(design: ModelConfig) -> set[str]:
    """Weights that no cast may narrow."""
    return {weight.name for weight in declared.weights(design) if weight.role in FLOAT32}


def _equal_weights(law: str, want: Values, got: Values, wide: set[str]) -> None:
    if got.keys() != want.keys():
        raise LawBroken(law, f"parameters {sorted(got.keys() ^ want.keys())[:3]} are in one of the two only")
    for name, x in want.items():
        if got[name].dtype != x.dtype or not torch.equal(got[name], x):
            raise LawBroken(law, f"{name} is not what it was ({x.dtype}, now {got[name].dtype})")
        if name in wide and x.dtype not in (torch.float32, torch.float64):
            raise LawBroken(law, f"{name} is {x.dtype}, in which one decay cannot be told from another")


def _refuses_strays(law: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    tensors = safetensors.torch.load(data)
    name = sorted(tensors)[0]
    broken: dict[str, Callable[[], object]] = {
        "a tensor that nothing uses": lambda: safetensors.torch.save_file(
            tensors | {"stray": tensors[name].clone()}, path
        ),
        "a missing tensor": lambda: safetensors.torch.save_file({n: x for n, x in tensors.items() if n != name}, path),
        "a tensor of another shape": lambda: safetensors.torch.save_file(
            tensors | {name: tensors[name][:-1].clone()}, path
        ),
        "a file cut short": lambda: path.write_bytes(data[:-7]),
    }
    for what, write in broken.items():
        write()
        try:
            load(folder)
        except ValueError:
            continue
        raise LawBroken(law, f"{what} was no error")


@torch.no_grad()
def counts(design: ModelConfig, device: str, dtype: torch.dtype) -> float:
    """10: parameters, FLOPs and state bytes are what the design says without building it."""
    windows = [place.layer.window for place in layers(design.slots) if isinstance(place.layer, Attention)]
    shortest = min([window for window in windows if window], default=19)  # within which no window cuts what is measured
    if shortest <= design.front.meta:
        design = design.replace(front=design.front.replace(meta=0))
    law, model, length = "counts", subject(design, device, dtype), shortest - design.front.meta
    tokens = some_tokens(design, length, device)[None]
    with forced("reference"), FlopCounterMode(display=False) as counter:
        model(tokens)
    _, state = model(tokens, model.init_state(1, length))
    seen: set[int] = set()
    for row, slot in zip(count.slot_counts(design, length), model.slots, strict=True):
        fresh = {id(p): p.numel() for p in slot.parameters() if id(p) not in seen}
        seen |= fresh.keys()
        _counted(law, f"parameters of {row.address}", row.parameters, sum(fresh.values()))
    _counted(law, "parameters", count.parameters(design), sum(p.numel() for p in model.parameters()))
    read = length + design.front.meta  # which pass through the slots alone
    slots = sum(row.flops for row in count.slot_counts(design, read))
    flops = count.flops_per_token(design, read) * length + slots * design.front.meta
    _counted(law, f"FLOPs of {length} tokens", flops, counter.get_total_flops())
    name = str(dtype).removeprefix("torch.")
    _counted(law, "state bytes", count.state_bytes(design, length, name), state.nbytes)
    return 0.0


def surgery(design: ModelConfig, device: str, dtype: torch.dtype) -> float:
    """15: swapping a layer for its equal changes nothing; for another, nothing but that layer, and back again."""
    law, model = "surgery", subject(design, device, dtype)
    tokens = some_tokens(design, 20, device)[None]
    logits = {"": model(tokens)[0]}
    for place in layers(design.slots):
        same = swap(model, {place.address: place.layer})
        if same.design.hash != design.hash or any(a is not b for a, b in zip(same.slots, model.slots, strict=True)):
            raise LawBroken(law, f"{place.address} for its equal is another model")
        agree(law, f"{place.address} for its equal", {"": same(tokens)[0]}, logits, exactly=True)
    for place in list(layers(design.slots))[:2]:
        _other_layer(law, model, place, tokens)
    agree(law, "the model that was changed", {"": model(tokens)[0]}, logits, exactly=True)
    return 0.0


def _other_layer(law: str, model: LanguageModel, place: Place, tokens: torch.Tensor) -> None:
    layer, address = place.layer, place.address
    other = GELU(hidden=24)
    if isinstance(layer, Mixer) and not layer.out_proj:  # at inner, where a layer must be as wide as the others
        other = GatedConv(width=layer.inner())
    student = swap(model, {address: other})
    kept = {id(p) for p in model.parameters()}
    names = {name for name, p in student.named_parameters() if id(p) not in kept}
    stated = {weight.name: weight.shape for weight in declared.weights(student.design)}
    have = {name: tuple(p.shape) for name, p in student.named_parameters()}
    if stated != have:
        raise LawBroken(law, f"{address}: weights {sorted(stated.items() ^ have.items())[:2]} are not as declared")
    own = (*(weight.name for weight in other.weights(model.design.dim)), ".value_mix")
    if not names or not all(name.endswith(own) for name in names):
        raise LawBroken(law, f"{address}: {sorted(names)[:3]} are new, and should be the new layer's alone")
    student(tokens, student.init_state())


def _counted(law: str, what: str, counted: int, measured: int) -> None:
    if counted != measured:
        raise LawBroken(law, f"{what}: counted {counted:,}, measured {measured:,}")


def has_compiler() -> bool:
    """Whether inductor can turn its C++ and the launchers of its kernels into code here."""
    return any(map(shutil.which, ("c++", "g++", "clang++")))


def compiled(design: ModelConfig, device: str, dtype: torch.dtype, backend: str = "aot_eager") -> float:
    """11: torch.compile takes training, reading and decoding as one graph each, and the answers agree; training on packed
    documents and under autocast too, where every hand-written gradient has the dtype of its input, wherever it is taken."""
    law, model = "compiled", subject(design, device, dtype)
    tokens = some_tokens(design, 70, device)[None]
    torch.compiler.reset()
    graph = torch.compile(model, fullgraph=True, backend=backend)
    try:
        got = with_gradients(model, lambda: outcome(list(graph(tokens)[0]), None))  # before anything ran without it
        want = with_gradients(model, lambda: outcome(list(model(tokens)[0]), None))
        worst = agree(law, "training", got, want)
        with torch.no_grad():
            logits, state = model(tokens, model.init_state(1, 80))
            got = outcome(list(graph(tokens, model.init_state(1, 80))[0]), None)
            worst = max(worst, agree(law, "reading", got, outcome(list(logits), None)))
        under_autocast(law, model, graph, tokens)
        worst = max(worst, graphs.packing(law, model, tokens, backend), graphs.decoding(law, model, tokens, backend))
    except TorchDynamoException as error:
        raise LawBroken(law, " ".join(str(error).split())[:300]) from error
    finally:
        torch.compiler.reset()
    return worst


def under_autocast(law: str, model: LanguageModel, graph: Callable, tokens: torch.Tensor) -> None:
    """What this finds is not measured with the rest: bfloat16 rounds a thousand times as much."""

    def autocast() -> torch.autocast:
        return torch.autocast(tokens.device.type, torch.bfloat16)

    def run(form: Callable, offsets: torch.Tensor | None = None) -> Values:
        with autocast():
            return outcome(list(form(tokens, cu_seqlens=offsets)[0].float()), None)

    got = with_gradients(model, partial(run, graph))
    with input_dtypes(law):
        want = with_gradients(model, partial(run, model))
    agree(law, "training under autocast", got, want, tolerances=AUTOCAST)
    packed = partial(run, model, torch.tensor([0, 66, 70], dtype=torch.int32))
    with input_dtypes(law):
        want = with_gradients(model, packed)
    with autocast():
        got = with_gradients(model, packed)
    agree(law, "gradients taken under autocast", got, want, tolerances=AUTOCAST)


@contextmanager
def input_dtypes(law: str) -> Iterator[None]:
    """Inside, a Function whose gradient is of another dtype than its input breaks the law. Autograd would cast it without a
    word; a compiler that traces through it may refuse it."""
    apply = BackwardCFunction.apply

    def checked(node: Any, *outputs: Any) -> Any:
        result = apply(node, *outputs)
        gradients = result if isinstance(result, tuple) else (result,)
        wanted = [g for g, needed in zip(gradients, node.needs_input_grad, strict=False) if needed]
        inputs = [(before, number) for before, number in node.next_functions if before is not None]
        for gradient, (before, number) in zip(wanted, inputs, strict=True):
            want = before._input_metadata[number].dtype
            if gradient is not None and gradient.dtype != want:
                raise LawBroken(law, f"{node.name()}: a gradient is {gradient.dtype}, its input {want}")
        return result

    BackwardCFunction.apply = checked  # pyright: ignore[reportAttributeAccessIssue]  # one that watches
    try:
        yield
    finally:
        BackwardCFunction.apply = apply


PACKAGES = ["fla", "mamba_ssm", "causal_conv1d", "flash_attn", "triton"]
if not LOOKS_INSIDE:  # there, marking functions for the compiler makes torch import its own Triton support
    PACKAGES.remove("triton")

_FAKE = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise RuntimeError("0 active drivers: this package is installed, but there is no GPU")
"""

_USE = """
import sys, torch, plait
torch.set_num_threads(1)
for design in {designs!r}:
    model = plait.build(plait.load_design(design))
    front = model.design.front
    tokens = torch.randn(1, 70, front.features) if hasattr(front, "features") else torch.arange(70)[None] % 10
    logits, state = model(tokens, model.init_state())
    logits.sum().backward()
    with torch.no_grad():
        model(tokens[:, :1], state)
        model(tokens, cu_seqlens=torch.tensor([0, 30, 70]))
print(*[name for name in {packages!r} if name in sys.modules])
"""


def packages(designs: list[ModelConfig]) -> float:
    """13: with kernel packages installed and no GPU everything runs, and none of them is even imported."""
    law = "packages"
    with tempfile.TemporaryDirectory() as folder:
        for name in PACKAGES:
            (Path(folder) / f"{name}.py").write_text(_FAKE, encoding="utf-8")
        script = Path(folder) / "use.py"  # too long for a command line
        use = _USE.format(designs=[design.to_dict() for design in designs], packages=PACKAGES)
        script.write_text(use, encoding="utf-8")
        paths = [folder, *[p for p in sys.path if p]]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
        run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, encoding="utf-8")
    if run.returncode != 0:
        raise LawBroken(law, (run.stderr.strip().splitlines() or ["no output"])[-1])
    if run.stdout.strip():
        raise LawBroken(law, f"imported without being asked for: {run.stdout.strip()}")
    return 0.0
