"""Passes that multiple shooting needs: against the length of the sequence, before and after training, per cell.

    python benchmarks/convergence.py --text FILE [--out benchmarks/results/convergence.json]
    python benchmarks/convergence.py --picture docs/images/gap_by_pass.svg

Each cell is the mixer of a byte-level model of two layers, "(CF)2", dim 64. Its layers read real text, the last 131,072 bytes
of FILE, of which the model sees the first 256, 1,024, ... in one call; the rest of FILE is what it is trained on. Passes are
what a call's stats say of the layer that needed most, in float32 to its own tolerance (2e-6 at the joints): as initialised,
and after training. "fell_back": the passes did not close the joints, and the tokens were run one by one.

The picture is of the method alone: the gap at the joints of 16 chunks of 64 tokens after every pass, in float64, for cells that
forget, cells that remember and one that is chaotic.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import plait
from plait.design import load_design
from plait.model import token_loss
from plait.ops.packing import chunks
from plait.ops.shooting import GRU, LSTM, RNN, Bound, chunked
from plait.ops.shooting.jacobian import blocks, chunk_jacobians

CELLS: dict[str, dict[str, Any]] = {
    "RNN, diagonal": {"kind": "rnn"},
    "GRU, diagonal": {"kind": "gru"},
    "GRU, diagonal, gate_bias 0 to 6": {"kind": "gru", "gate_bias": (0, 6)},
    "LSTM, diagonal": {"kind": "lstm"},
    "LSTM, diagonal, coupled, peephole": {"kind": "lstm", "coupled": True, "peephole": True},
    "sLSTM, diagonal": {"kind": "slstm", "recurrence": "diagonal"},
    "sLSTM, 4 heads of 16": {"kind": "slstm", "heads": 4},
    "LSTM, dense": {"kind": "lstm", "recurrence": "dense"},
}
LENGTHS = (256, 1024, 4096, 16_384, 65_536, 131_072)
DIM, BATCH, TRAINED_AT = 64, 8, 256
CHUNKS, CHUNK, UNITS = 16, 64, 32


def text_of(path: Path) -> tuple[Tensor, Tensor]:
    """Bytes to train on, and bytes to measure on."""
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    if len(data) < 2 * LENGTHS[-1]:
        raise SystemExit(f"{path}: {len(data):,} bytes; expected at least {2 * LENGTHS[-1]:,}")
    return data[: -LENGTHS[-1]], data[-LENGTHS[-1] :]


def train(model: plait.LanguageModel, text: Tensor, steps: int) -> float:
    """The mean loss of the last tenth of the steps, in nats a byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - TRAINED_AT, (BATCH, 1))
        tokens = text[starts + torch.arange(TRAINED_AT + 1)].to(model.device)
        total, scored = token_loss(model, tokens[:, :-1], tokens[:, 1:])
        (total / scored).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total.item() / scored)
    last = losses[-(steps // 10) :]
    return sum(last) / len(last)


@torch.no_grad()
def measure(model: plait.LanguageModel, text: Tensor) -> dict[int, dict[str, Any]]:
    """By length, the layer that needed most."""
    found = {}
    for length in LENGTHS:
        sent = plait.Channels()
        model.features(text[None, :length].to(model.device), channels=sent)
        info = sent.over_layers("solver")
        found[length] = {"passes": int(info.passes), "gap": float(info.gap), "fell_back": bool(info.fell_back)}
    return found


def rows(cells: list[str], path: Path, steps: int, device: str) -> dict[str, dict[str, Any]]:
    """One record per cell."""
    training, held, found = *text_of(path), {}
    for name in cells:
        torch.manual_seed(0)
        start = time.perf_counter()
        design = {"vocab": 256, "dim": DIM, "pattern": "(CF)2", "layers": {"C": CELLS[name]}}
        model = plait.build(load_design(design), seed=0, device=device)
        found[name] = {"before": measure(model, held), "loss": train(model, training, steps)}
        found[name]["after"] = measure(model, held)
        print(f"{name}: {time.perf_counter() - start:.0f} s, loss {found[name]['loss']:.3f}", flush=True)
        for when in ("before", "after"):
            print(f"  {when:<7}" + "".join(f"{n:>9,}: {label(row):<4}" for n, row in found[name][when].items()))
    return found


def label(row: dict[str, Any]) -> str:
    return f"{row['passes']}, loop" if row["fell_back"] else str(row["passes"])


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown: passes before -> after training."""
    lines = ["| cell |" + "".join(f" {n:,} |" for n in LENGTHS), "|---|" + "---:|" * len(LENGTHS)]
    for name, record in found.items():
        pairs = zip(record["before"].values(), record["after"].values(), strict=True)
        lines.append(f"| {name} |" + "".join(f" {label(before)} → {label(after)} |" for before, after in pairs))
    return lines


# the picture


def pictured() -> Iterator[tuple[str, str, Bound]]:
    """Labels, line styles and cells; inputs are N(0, 1), and what is wanted is their gates' bias and what they hear."""
    for bias in (0, 6):
        biases = torch.zeros(3, 1, UNITS).double()
        biases[0] = -bias
        diagonal = (2 * torch.rand(3, 1, UNITS) - 1).double()
        yield f"diagonal GRU, remembers {'2' if bias == 0 else '400'} tokens", "-", GRU().bind(diagonal, bias=biases)
    for bias in (0, 3):
        biases = torch.zeros(4, 1, UNITS).double()
        biases[0] = bias
        dense = ((2 * torch.rand(4, 1, UNITS, UNITS) - 1) * UNITS**-0.5).double()
        yield f"dense LSTM, forget bias {bias}", "--", LSTM().bind(dense, bias=biases)
    yield "dense RNN, chaotic", ":", RNN().bind(3.0 * UNITS**-0.5 * torch.randn(1, 1, UNITS, UNITS).double())


@torch.no_grad()
def gaps(cell: Bound, x: Tensor) -> list[float]:
    """After each pass, the largest miss at a joint as the solver measures it."""
    layout = chunks(*x.shape[:2], CHUNK, None)
    tokens, first = layout.by_step(x), cell.cell.start_like(x, 1)
    s, found = cell.cell.start_like(x, CHUNKS), []
    for _ in range(CHUNKS):
        states = chunked.run(cell, tokens, s)
        want = chunked.following(states[-1], first, layout)
        found.append(float(((want - s).abs() / want.abs().clamp(min=1)).amax()))
        before = torch.cat([s[None], states[:-1]])
        s = chunked.close(chunk_jacobians(cell, tokens, before), states[-1], s, layout, blocks(cell))
    return found


def picture(path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    torch.manual_seed(0)
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    for label, style, cell in pictured():
        x = torch.randn(1, CHUNKS * CHUNK, len(cell.cell.inputs), 1, UNITS).double()
        found = [min(max(gap, 1e-17), 10.0) for gap in gaps(cell, x)]  # what Newton makes of chaos is off any axis
        print(f"{label}: " + " ".join(f"{gap:.0e}" for gap in found))
        axes.plot(range(1, CHUNKS + 1), found, style, marker="o", markersize=3.5, label=label)
    axes.axhline(2e-6, color="gray", linewidth=0.8)
    axes.text(5, 3e-6, "tolerance in float32", va="bottom", color="gray", fontsize=9)
    axes.set(
        yscale="log", xlabel="pass", ylabel="largest gap at a joint", xticks=range(1, CHUNKS + 1), ylim=(1e-17, 30)
    )
    axes.legend(fontsize=9, frameon=False, loc="lower left", bbox_to_anchor=(0.38, 0.02))
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "plait"
    figure.savefig(path, **({"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 150}))
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    if args.picture:
        picture(args.picture)
    if args.text:
        result = {
            "torch": torch.__version__,
            "dim": DIM,
            "dtype": "float32",
            "steps": args.steps,
            "device": args.device,
        }
        result["cells"] = rows(args.cells, args.text, args.steps, args.device)
        print("\n".join(table(result["cells"])))
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
