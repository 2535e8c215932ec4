"""Peak memory of a training step as sequences grow, and decode time as the context grows.

    python benchmarks/memory.py [--out benchmarks/results/memory.json]

Memory: each length runs in a process of its own; figures are the growth of the peak resident set over the built model
and optimiser. The issue's bar: eight times the length takes at most nine times the memory in a recurrent stack.
Decode: milliseconds per token after 256 to 16,384 tokens, median; the bar: a recurrent stack stays within 10 %.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import plait
from plait.evaluate.machine import machine
from plait.model import token_loss

LENGTHS, CONTEXTS = (1024, 2048, 4096, 8192), (256, 1024, 4096, 16_384)
RECURRENT, ALL = ("(MF)4", "(DF)4"), ("(MF)4", "(DF)4", "(WF)4", "(AF)4", "(DF)3 AF")
DIM, VOCAB = 256, 257


def model_of(pattern: str) -> plait.LanguageModel:
    return plait.build(plait.ModelConfig(vocab=VOCAB, dim=DIM, pattern=pattern))


def peak_kib() -> int:
    """The highest resident set of this process so far, in KiB."""
    line = next(line for line in Path("/proc/self/status").read_text("utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def one_step(pattern: str, length: int) -> None:
    """Print how much a training step over `length` tokens raises the peak, in MiB."""
    torch.set_num_threads(1)
    model = model_of(pattern)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(VOCAB, (1, 65))

    def step(tokens: torch.Tensor) -> None:
        total, scored = token_loss(model, tokens[:, :-1], tokens[:, 1:])
        (total / scored).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(tokens)  # optimizer state, thread pools and lazily loaded code are not what is measured
    before = peak_kib()
    step(torch.randint(VOCAB, (1, length + 1)))
    print((peak_kib() - before) / 1024)


def memory(pattern: str) -> dict[int, float]:
    """MiB by length."""
    command = [sys.executable, __file__, "--step", pattern]
    run = {
        n: subprocess.run([*command, str(n)], check=True, capture_output=True, encoding="utf-8").stdout for n in LENGTHS
    }
    return {n: float(out) for n, out in run.items()}


@torch.inference_mode()
def decode(patterns: tuple[str, ...], rounds: int) -> dict[str, dict[int, float]]:
    """Milliseconds per token by context; contexts take turns, so that a busy machine slows all alike."""
    states = {}
    for pattern in patterns:
        model = model_of(pattern)
        state = model.init_state(1, max(CONTEXTS) + 1)
        for context in CONTEXTS:
            while state.lengths[0] < context:
                _, state = model.features(torch.randint(VOCAB, (1, min(1024, context - state.lengths[0]))), state)
            states[pattern, context] = (model, state.fork())
    times: dict[tuple[str, int], list[float]] = {key: [] for key in states}
    token = torch.zeros(1, 1, dtype=torch.long)
    for pattern in patterns:
        for turn in range(rounds):
            for i in range(len(CONTEXTS)):  # a new order each round: whoever comes first finds colder caches
                context = CONTEXTS[(turn + i) % len(CONTEXTS)]
                model, state = states[pattern, context]
                start = time.perf_counter()
                model(token, state)
                times[pattern, context].append((time.perf_counter() - start) * 1e3)
    return {p: {c: statistics.median(times[p, c]) for c in CONTEXTS} for p in patterns}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.step:
        return one_step(args.step[0], int(args.step[1]))
    result = {
        "torch": torch.__version__,
        "machine": machine(),
        "dim": DIM,
        "dtype": "float32",
        "training_peak_mib": {},
        "decode_ms": {},
    }
    for pattern in ALL:
        peaks = memory(pattern)
        ratio = peaks[LENGTHS[-1]] / peaks[LENGTHS[0]]
        result["training_peak_mib"][pattern] = {"by_length": peaks, "ratio": ratio}
        print(f"{pattern:<10} training " + "  ".join(f"{n}: {m:.0f} MiB" for n, m in peaks.items()) + f"  {ratio:.1f}x")
    for pattern, row in decode(ALL, args.rounds).items():
        spread = max(row.values()) / min(row.values())
        result["decode_ms"][pattern] = {"by_context": row, "spread": spread}
        print(f"{pattern:<10} decode   " + "  ".join(f"{c}: {ms:.2f} ms" for c, ms in row.items()) + f"  {spread:.2f}x")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {args.out}")
    return None


if __name__ == "__main__":
    main()
