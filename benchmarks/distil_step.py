"""A step of distillation on a GPU, and KL over the vocabulary alone: errors beside float64, milliseconds, tokens/s, kernels.

    python benchmarks/distil_step.py --out benchmarks/results/distil_step.json

Teacher and student have SmolLM2's shape and that of its hybrid with a quarter of attention, random weights in float32 under
autocast, both compiled as a run compiles them, AdamW. KL is held beside the same formula compiled by torch.
"""

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import plait
from plait.evaluate.clock import seconds
from plait.evaluate.kernels import kernels
from plait.evaluate.machine import machine
from plait.model import Distillation
from plait.ops.kl import kl
from plait.train.step import autocast, compile_slots

VOCAB, DIM, LENGTH, ROWS = 49_152, 576, 1024, 2730  # rows of a slice of logits
LAYERS = {"A": plait.Attention(heads=9, kv_heads=3), "F": plait.SwiGLU(hidden=1536)}
TEACHER, STUDENT = "(AF)30", "((DF)3 AF)7 (DF)2"
CUDA = torch.device("cuda")


def in_float64(y: torch.Tensor, theirs: torch.Tensor, scored: torch.Tensor, T: float) -> tuple[torch.Tensor, Any]:
    y = y.double().requires_grad_()
    p = (theirs.double() / T).log_softmax(-1)
    total = ((p.exp() * (p - (y / T).log_softmax(-1))).sum(-1) * scored).sum() * T**2
    return total.detach(), torch.autograd.grad(total, y)[0]


@torch.compile
def by_the_compiler(y: torch.Tensor, theirs: torch.Tensor, scored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    theirs, ours = theirs.float().log_softmax(-1), y.float().log_softmax(-1)
    p = theirs.exp()
    total = (torch.linalg.vecdot(p, theirs - ours) * scored).sum()
    return total, ((ours.exp() - p) * scored[:, None]).to(y.dtype)


def errors() -> list[dict[str, Any]]:
    found = []
    for vocab, dtype, T in [
        (v, d, T) for v in (VOCAB, 5001) for d in (torch.bfloat16, torch.float32) for T in (1.0, 2.0)
    ]:
        y, theirs = ((4 * torch.randn(64, vocab + 3, device=CUDA)).to(dtype)[:, :vocab] for _ in range(2))
        scored = torch.rand(64, device=CUDA) > 0.2
        (total, dy), (truth, grad) = kl(y, theirs, scored, T, True), in_float64(y, theirs, scored, T)
        found.append(
            {
                "vocab": vocab,
                "dtype": str(dtype).removeprefix("torch."),
                "T": T,
                "total": abs(float(total / truth) - 1),
                "gradient": float((dy.double() - grad).abs().max() / grad.abs().max()),
                "equal_again": torch.equal(dy, kl(y, theirs, scored, T, True)[1]),
            }
        )
        print(found[-1], flush=True)
    return found


def median_ms(run: Any, rounds: int = 10) -> float:
    run()
    return 1e3 * sorted(seconds(run, CUDA, rounds))[rounds // 2]


def a_slice() -> dict[str, float]:
    y, theirs = (torch.randn(ROWS, VOCAB, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    scored = torch.ones(ROWS, device=CUDA, dtype=torch.bool)
    ours, compiled = (
        median_ms(lambda: kl(y, theirs, scored, 1.0, True)),
        median_ms(lambda: by_the_compiler(y, theirs, scored)),
    )
    print(f"KL of {ROWS:,} x {VOCAB:,}: {ours:.2f} ms, by the compiler {compiled:.2f}", flush=True)
    return {"kernel_ms": ours, "compiled_ms": compiled}


def a_step(teacher: plait.LanguageModel, student: plait.LanguageModel, batch: int) -> dict[str, Any]:
    objective = Distillation(student, teacher).train()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4, fused=True)
    ids = torch.randint(VOCAB, (batch, LENGTH + 1), device=CUDA)
    read = SimpleNamespace(inputs=ids[:, :-1], targets=ids[:, 1:], cu_seqlens=None)

    def run() -> None:
        with autocast(CUDA, "bfloat16"):
            loss = objective(read)
        loss.mean.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    ms, rows = median_ms(run), kernels(run, CUDA, 2)
    inside, memory = sum(row.ms for row in rows), torch.cuda.max_memory_allocated()
    print(
        f"{batch} x {LENGTH}: {ms:.1f} ms, {batch * LENGTH / ms * 1e3:,.0f} tokens/s, kernels {inside:.1f} ms",
        flush=True,
    )
    for row in rows[:12]:
        print(f"  {row.ms:7.2f} ms {row.calls:5.0f} x {row.name[:90]}", flush=True)
    top = [{"name": row.name, "ms": row.ms, "calls": row.calls} for row in rows[:24]]
    return {"batch": batch, "ms": ms, "kernels_ms": inside, "first_s": first, "peak_memory": memory, "kernels": top}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[24, 48], help=f"sequences of {LENGTH} tokens")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    teacher, student = (
        plait.build(plait.ModelConfig(vocab=VOCAB, dim=DIM, pattern=pattern, layers=LAYERS), device=CUDA)
        for pattern in (TEACHER, STUDENT)
    )
    compile_slots(student, teacher)
    found = {"gpu": torch.cuda.get_device_name(), "machine": machine(), "errors": errors(), "slice": a_slice()}
    found["steps"] = [a_step(teacher, student, batch) for batch in options.batches]
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
