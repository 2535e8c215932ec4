"""Nonlinear recurrences on one GPU beside their peers: the table of docs/shooting.md.

python benchmarks/shooting_gpu.py --out benchmarks/results/shooting_h100.json

The peers, pararnn-torch and flash-linear-attention, are timed where they are installed.

Every cell is first checked against the loop over tokens in float64. Times are medians, in bfloat16, of a forward pass and
all gradients unless said. "Cell" is the input projection and the recurrence, as the peers time it.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from triton.testing import do_bench

from plait import GRU, LSTM, ModelConfig
from plait.layers import build_stack, context_for
from plait.layers.recurrent import RecurrentCell
from plait.ops.shooting import Bound, cells, reference, shooting

warnings.filterwarnings("ignore")  # pararnn-torch warns of its residual at every call; ours is in the table
BF16 = torch.bfloat16
UNITS = 64  # of each cell are followed in float64


def forward_and_backward(run: Callable[[Tensor], Tensor], x: Tensor, weights: Iterable[Tensor]) -> Callable[[], Any]:
    inputs, y = [x, *weights], run(x)
    gradient = torch.randn_like(y)
    return lambda: torch.autograd.grad(run(x), inputs, gradient)


def median(run: Callable[[], Any]) -> float:
    return do_bench(run, warmup=50, rep=300, return_mode="median")


def op_inputs(cell: cells.Cell, b: int, t: int, d: int) -> tuple[Tensor, Bound]:
    g = len(cell.inputs)
    x = torch.randn(b, t, g, 1, d, device="cuda", dtype=BF16).requires_grad_()
    recurrent = (torch.randn(g, 1, d, device="cuda") * 0.25).clamp(-0.5, 0.5).requires_grad_()
    weights = tuple((torch.randn(1, d, device="cuda") * 0.25).clamp(-0.5, 0.5).requires_grad_() for _ in cell.weights)
    return x, cell.bind(recurrent, weights=weights)


def error(cell: cells.Cell, b: int, t: int, d: int) -> dict[str, float]:
    """Largest difference from the float64 loop over its largest value, on some of the units: outputs and gradients."""
    x, bound = op_inputs(cell, b, t, d)
    y, final, info = shooting(bound, x, state=bound.cell.start_like(x, b, torch.float32))
    dy, dfinal = torch.randn_like(y), torch.randn_like(final)
    got = torch.autograd.grad([y, final], [x, *bound.tensors()], [dy, dfinal])
    some = [w[..., :UNITS].double().detach().requires_grad_() for w in (x, *bound.tensors())]
    states, last = reference.run(bound.with_tensors(some[1:]), some[0], bound.cell.start_like(some[0], b), None)
    want = torch.autograd.grad([states[:, :, 0], last], some, [dy[..., :UNITS].double(), dfinal[..., :UNITS].double()])
    gaps = [relative(a[..., :UNITS], b) for a, b in zip(got, want, strict=True)]
    return {"output": relative(y[..., :UNITS], states[:, :, 0]), "gradients": max(gaps), "gap": info.gap.item()}


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def recurrent_cell(config: Any, d: int) -> RecurrentCell:
    return RecurrentCell(config, d).cuda().to(BF16)


def time_cell(config: Any, b: int, t: int, d: int) -> float:
    cell = recurrent_cell(config, d)
    x = torch.randn(b, t, d, device="cuda", dtype=BF16).requires_grad_()
    return median(forward_and_backward(lambda x: cell(x)[0], x, cell.parameters()))


def time_layer(config: Any, b: int, t: int, d: int) -> float:
    """The whole layer: convolution, cell, gated norm, output projection."""
    slot = build_stack(ModelConfig(vocab=64, dim=d, pattern="G", layers={"G": config}))[0].mixer.cuda().to(BF16)
    context = context_for(torch.zeros(b, t, dtype=torch.long, device="cuda"))
    x = torch.randn(b, t, d, device="cuda", dtype=BF16).requires_grad_()
    return median(forward_and_backward(lambda x: slot(x, context, None)[0], x, slot.parameters()))


def time_op(cell: cells.Cell, b: int, t: int, d: int) -> tuple[float, float]:
    x, bound = op_inputs(cell, b, t, d)
    with torch.no_grad():
        forward = median(lambda: shooting(bound, x))
    return forward, median(forward_and_backward(lambda x: shooting(bound, x)[0], x, bound.tensors()))


def time_pararnn(name: str, b: int, t: int, d: int) -> float | None:
    try:
        import pararnn
    except ImportError:
        return None
    layer = pararnn.ParaRNN(getattr(pararnn, name)(d, d)).cuda().to(BF16).train()
    x = torch.randn(b, t, d, device="cuda", dtype=BF16).requires_grad_()
    return median(forward_and_backward(layer, x, layer.parameters()))


def time_hgrn(b: int, t: int, d: int) -> float | None:
    try:
        from fla.ops.hgrn import chunk_hgrn
    except ImportError:
        return None
    x = torch.randn(b, t, d, device="cuda", dtype=BF16).requires_grad_()
    g = torch.nn.functional.logsigmoid(torch.randn(b, t, d, device="cuda", dtype=BF16)).requires_grad_()
    return median(forward_and_backward(lambda x: chunk_hgrn(x, g)[0], x, [g]))


def dense_lstm(b: int, t: int, d: int) -> dict[str, Any]:
    """torch.nn.LSTM as it is initialised: cuDNN's time, ours with the same weights, and how far apart they are."""
    theirs = nn.LSTM(d, d, batch_first=True).cuda().to(BF16)
    ours = RecurrentCell.from_torch(theirs)
    x = torch.randn(b, t, d, device="cuda", dtype=BF16).requires_grad_()
    exact = nn.LSTM(d, d, batch_first=True).double()
    exact.load_state_dict({name: w.double().cpu() for name, w in theirs.state_dict().items()})
    with torch.no_grad():
        want = exact.cuda()(x[:1].double())[0]
        result = {"error": relative(ours(x[:1])[0], want), "cudnn_error": relative(theirs(x[:1])[0], want)}
        info = ours(x)[2]
    result |= {"passes": info.passes.item(), "gap": info.gap.item(), "fell_back": info.fell_back.item()}
    with torch.no_grad():
        result |= {"forward": median(lambda: ours(x)), "cudnn_forward": median(lambda: theirs(x))}
    result["ms"] = median(forward_and_backward(lambda x: ours(x)[0], x, ours.parameters()))
    return result | {"cudnn": median(forward_and_backward(lambda x: theirs(x)[0], x, theirs.parameters()))}


Row = tuple[str, float | str | None, Callable[[], dict[str, Any]]]
B, T, D = 8, 4096, 2048
CLIP: dict[str, Any] = {"clip": 0.5}
PARA: dict[str, Any] = {"coupled": True, "peephole": True}  # ParaLSTM
HEADS: dict[str, Any] = CLIP | {"heads": 16, "head_dim": 128}
LONG: dict[str, Any] = CLIP | {"heads": 2, "head_dim": 128}
PARA_LSTM = cells.LSTM(coupled=True, peephole=True)


def cell_row(config: Any, *shape: int, **others: float | None) -> dict[str, Any]:
    return {"ms": time_cell(config, *shape), **others}


def op_row(cell: cells.Cell, *shape: int) -> dict[str, Any]:
    forward, both = time_op(cell, *shape)
    return {"forward": forward, "ms": both, **error(cell, shape[0], min(shape[1], 8192), shape[2])}


ROWS: tuple[Row, ...] = (
    ("GRU op", "forward 0.4, both 1.5",
     lambda: op_row(cells.GRU(), B, T, D) | {"fla chunk_hgrn": time_hgrn(B, T, D)}),
    ("ParaLSTM op", None, lambda: op_row(PARA_LSTM, B, T, D)),
    ("LSTM op", None, lambda: op_row(cells.LSTM(), B, T, D)),
    ("sLSTM op, diagonal", None, lambda: op_row(cells.SLSTM(), B, T, D)),
    ("RNN op", None, lambda: op_row(cells.RNN(), B, T, D)),
    ("GRU cell, projection in 16 heads", 3.0, lambda: cell_row(GRU(**HEADS, projection="heads"), B, T, D, ParaRNN=25.8)),
    ("ParaLSTM cell, projection in 16 heads", 4.5,
     lambda: cell_row(LSTM(**HEADS, **PARA, projection="heads"), B, T, D, ParaRNN=33.2)),
    ("GRU cell, dense projection", 6.0,
     lambda: cell_row(GRU(**HEADS), B, T, D, **{"pararnn-torch": time_pararnn("ParaGRU", B, T, D)})),
    ("ParaLSTM cell, dense projection", 8.0,
     lambda: cell_row(LSTM(**HEADS, **PARA), B, T, D, **{"pararnn-torch": time_pararnn("ParaLSTM", B, T, D)})),
    ("torch LSTM, dense 2048", 30.0, lambda: dense_lstm(B, T, D)),
    ("B 1, T 131,072, D 256: GRU cell, dense projection", 3.0, lambda: cell_row(GRU(**LONG), 1, 131_072, 256, ParaRNN=17.6)),
    ("B 1, T 131,072, D 256: GRU layer with all around it", None, lambda: {"ms": time_layer(GRU(**LONG), 1, 131_072, 256)}),
    ("B 1, T 131,072, D 256: GRU op", None, lambda: op_row(cells.GRU(), 1, 131_072, 256)),
    ("B 1, T 32,768, D 2048: GRU op", None, lambda: op_row(cells.GRU(), 1, 32_768, 2048)),
)  # fmt: skip


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args()
    rows = []
    for what, bar, measure in ROWS:
        if args.only not in what:
            continue
        torch.manual_seed(0)
        row = {"what": what, "bar": bar, **measure()}
        rows.append(row)
        rest = ", ".join(f"{name} {shown(value)}" for name, value in row.items() if name not in ("what", "ms"))
        print(f"{what:54} {row['ms']:8.3f} ms   {rest}", flush=True)
        torch.cuda.empty_cache()
    if args.out:
        head = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "shape": f"B {B}, T {T}, D {D}, bfloat16, unless said; ms: forward and all gradients",
        }
        args.out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
