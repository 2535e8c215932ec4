"""Recurrent layers on a CPU: chunked forms beside their loops, long rows beside short ones, and transformers' own modules.

    python benchmarks/layers.py [--only ops,lengths,peers] [--rounds 7] [--out FILE.json]

All in one process, without gradients, float32. Times are medians of rounds in which what is compared takes turns. `ops`: an
op on one row of 2,048 tokens, as its `reference` and as its chunked form, at least 10 times as fast. `lengths`: a layer's
time per token at 8,192 tokens over that at 1,024, at most 1.3. `peers`: the same layer in transformers over ours, at least 3.
Another op, layer or peer is a line in `OPS`, `LAYERS` or `PEERS`.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from transformers import MambaConfig, RecurrentGemmaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock
from transformers.models.xlstm.configuration_xlstm import xLSTMConfig
from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

import plait
from plait.evaluate.machine import described, machine
from plait.layers import context_for
from plait.ops.delta import gated_delta
from plait.ops.gla import dplr, gla
from plait.ops.kernels import forced
from plait.ops.mlstm import mlstm
from plait.ops.scan import scan
from plait.ops.selective import selective_scan
from plait.ops.ssd import ssd

TOKENS, SHORT, LONG = 2048, 1024, 8192
DIM, PEER_DIM = (
    256,
    128,
)  # of a layer; beside a peer small, so that loops are compared rather than equal matrix products
FASTER, FLAT, PEER = 10.0, 1.3, 3.0
LEAST = 50.0  # milliseconds

Run = Callable[[], Any]


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(1, TOKENS, *shape)


def keys(*shape: int) -> torch.Tensor:
    return F.normalize(tokens(*shape), dim=-1)


def gates(*shape: int) -> torch.Tensor:
    return torch.rand(1, TOKENS, *shape)


# op: its sizes, and a call of it; small, since what chunks save is the cost of calling, not that of arithmetic
OPS: dict[str, tuple[str, Callable[[], Run]]] = {
    "ssd": ("2 heads of 32, state 32", lambda: partial(ssd, keys(1, 32), keys(1, 32), tokens(2, 32), -gates(2))),
    "delta": (
        "2 heads of 32 x 32",
        lambda: partial(gated_delta, keys(2, 32), keys(2, 32), tokens(2, 32), -gates(2), gates(2)),
    ),
    "gla": (
        "2 heads of 32 x 32",
        lambda: partial(gla, keys(2, 32), keys(2, 32), tokens(2, 32), -gates(2, 32)),
    ),
    "gla, with a removal": (
        "2 heads of 32 x 32",
        lambda: partial(dplr, keys(2, 32), keys(2, 32), tokens(2, 32), -gates(2, 32), -keys(2, 32), keys(2, 32)),
    ),
    "mlstm": (
        "2 heads of 32 x 32",
        lambda: partial(mlstm, tokens(2, 32), tokens(2, 32), tokens(2, 32), tokens(2), 3 + tokens(2)),
    ),
    "scan": ("64 channels", lambda: partial(scan, gates(64), tokens(64))),
    "selective": (
        "16 channels of 16",
        lambda: partial(selective_scan, tokens(16), 0.1 * gates(16), -torch.rand(16, 16), tokens(16), tokens(16)),
    ),
}

LAYERS = (  # letters at their defaults
    *("M", "D", "X", "Rn", "Li", "Sg", "Dn", "Gl", "Ht", "K", "Rw"),
    *("R", "Hg", "Mg", "Ml", "Ma"),
)


def layer(letter: str, dim: int, length: int) -> Run:
    """One layer on a row of tokens."""
    model = plait.build(plait.ModelConfig(vocab=7, dim=dim, pattern=letter))
    x = torch.randn(1, length, dim)
    return partial(model.slots[0].mixer, x, context_for(x), None)


def recurrent_gemma() -> Run:
    config = RecurrentGemmaConfig(hidden_size=PEER_DIM, lru_width=PEER_DIM, num_attention_heads=PEER_DIM // 64)
    block, positions = RecurrentGemmaRecurrentBlock(config, 0), torch.arange(TOKENS)[None]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return partial(block, torch.randn(1, TOKENS, PEER_DIM), positions, None, use_cache=False)


def mamba() -> Run:
    mixer = MambaMixer(MambaConfig(vocab_size=7, hidden_size=PEER_DIM, num_hidden_layers=1), 0).eval()
    return partial(mixer, torch.randn(1, TOKENS, PEER_DIM))


def xlstm() -> Run:
    heads = plait.MLSTM().resolve(PEER_DIM).heads
    config = xLSTMConfig(hidden_size=PEER_DIM, num_heads=heads, num_hidden_layers=1, mode="inference")
    return partial(xLSTMLayer(config).eval(), torch.randn(1, TOKENS, PEER_DIM))


# ours by letter, and transformers' module, its loop in torch as on any CPU
PEERS: dict[str, tuple[str, Callable[[], Run]]] = {
    "RecurrentGemma's block": ("R", recurrent_gemma),
    "Mamba's mixer": ("Ma", mamba),
    "xLSTM's layer": ("X", xlstm),
}


def in_turn(rounds: int, *runs: Run) -> list[float]:
    """Milliseconds of a call, the median of rounds of each: of as many calls as fill `LEAST` of them, so that what is quick is
    measured as it runs among its like, as what is slow is."""
    counts = [max(1, round(LEAST / timed(run, 2))) for run in runs]
    times = [[timed(run, count) for run, count in zip(runs, counts, strict=True)] for _ in range(rounds)]
    return [statistics.median(measured) for measured in zip(*times, strict=True)]


def timed(run: Run, count: int) -> float:
    start = perf_counter()
    for _ in range(count):
        run()
    return (perf_counter() - start) * 1e3 / count


def as_form(form: str, run: Run) -> Run:
    def call() -> None:
        with forced(form):
            run()

    return call


def ops(rounds: int) -> Iterator[dict[str, Any]]:
    for name, (sizes, make) in OPS.items():
        run, op = make(), name.partition(",")[0]
        loop, chunked = in_turn(rounds, as_form(f"{op}=reference", run), as_form(f"{op}=chunked", run))
        ratio = loop / chunked
        row = {"op": name, "sizes": sizes, "loop_ms": loop, "chunked_ms": chunked}
        yield row | {"ratio": ratio, "bar": FASTER, "holds": ratio >= FASTER}


def lengths(rounds: int) -> Iterator[dict[str, Any]]:
    for letter in LAYERS:
        short, long = in_turn(rounds, layer(letter, DIM, SHORT), layer(letter, DIM, LONG))
        ratio = long / LONG / (short / SHORT)
        row = {"layer": letter, f"ms_at_{SHORT}": short, f"ms_at_{LONG}": long}
        yield row | {"ratio": ratio, "bar": FLAT, "holds": ratio <= FLAT}


def peers(rounds: int) -> Iterator[dict[str, Any]]:
    for name, (letter, theirs) in PEERS.items():
        ours_ms, theirs_ms = in_turn(rounds, layer(letter, PEER_DIM, TOKENS), theirs())
        ratio = theirs_ms / ours_ms
        row = {"peer": name, "layer": letter, "ours_ms": ours_ms, "theirs_ms": theirs_ms}
        yield row | {"ratio": ratio, "bar": PEER, "holds": ratio >= PEER}


PARTS = {"ops": ops, "lengths": lengths, "peers": peers}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    found: dict[str, Any] = {"machine": machine(), "tokens": TOKENS, "dim": DIM, "peer_dim": PEER_DIM}
    print(described(found["machine"]))
    for part in options.only.split(","):
        found[part] = []
        for row in PARTS[part](options.rounds):
            found[part].append(row)
            shown = "  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print(f"{part}: {shown}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
